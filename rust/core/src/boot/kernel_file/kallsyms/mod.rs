//! The symbols that a stripped kernel carries for itself (CONFIG_KALLSYMS), found without any symbol.
//!
//! The tables are in read-only data, one after the other, in one of three orders:
//!
//! - to Linux 6.3: offsets, base, number, names, markers, tokens, token index
//! - from 6.4: number, names, markers, tokens, token index, offsets, base
//! - 7.3: the same without a base, as each offset is from its own place
//!
//! The token table is easy to recognise ([`tokens`]). From there the names are found through their markers ([`names`]),
//! and the addresses by where they must be then ([`addresses`]).

mod addresses;
mod names;
mod steps;
mod tokens;

use self::names::Names;
use self::steps::Steps;
use self::tokens::Tokens;
use super::pace::Pace;
use super::table::{LONGEST_NAME, Table};
use super::vmlinux::{KERNEL_START, Loaded};
use crate::error::Error;

/// Byte sequences like a token table that are looked at. Kernels have up to seven, the real one among them.
const CANDIDATES: usize = 64;

/// The symbols in the kernel's tables that lie in the kernel.
pub(super) fn read(vmlinux: &[u8], segments: &[Loaded<'_>], pace: &mut Pace<'_, '_>) -> Result<Table, Error> {
    let mut steps = Steps::new(pace);
    let mut candidates = CANDIDATES;
    let mut seen = false;
    for segment in segments {
        let mut from = 0;
        while let Some(digits) = tokens::next(segment.bytes, from, &mut steps)? {
            from = digits + 1;
            let Some(left) = candidates.checked_sub(1) else {
                break;
            };
            candidates = left;
            let Some(tokens) = Tokens::around(segment.bytes, digits) else {
                continue;
            };
            seen = true;
            let names = Names::find(segment.bytes, tokens.start, &mut steps);
            let names = steps.checked(names)?;
            if let Some(names) = names
                && let Some(addresses) = addresses::find(segment, &names, tokens.end, &mut steps)?
            {
                return decode(Table::new(vmlinux), &names, &tokens, &addresses, &mut steps);
            }
        }
    }
    let why = if seen {
        "the kernel keeps its symbols in a way that is not known, so its addresses have no names; use a vmlinux that \
         has its symbol table"
    } else {
        "the kernel has no symbols: it was built without CONFIG_KALLSYMS; use one that was built with it, or a vmlinux \
         that has its symbol table"
    };
    Err(Error::Invalid(why.to_owned()))
}

fn decode(
    mut table: Table,
    names: &Names<'_>,
    tokens: &Tokens<'_>,
    addresses: &[u64],
    steps: &mut Steps<'_, '_, '_>,
) -> Result<Table, Error> {
    let mut name = Vec::new();
    for (packed, &address) in names.iter().zip(addresses) {
        // Per-CPU variables and constants.
        if address < KERNEL_START {
            steps.pace.spend(1)?;
            continue;
        }
        name.clear();
        for &code in packed {
            name.extend_from_slice(tokens.token(code));
            // With the letter it is too long now, which the table refuses.
            if name.len() > 1 + LONGEST_NAME {
                break;
            }
        }
        steps.pace.spend(packed.len() + name.len())?;
        // The first letter is the symbol's type.
        table.push(address, name.get(1..).unwrap_or_default())?;
    }
    Ok(table)
}
