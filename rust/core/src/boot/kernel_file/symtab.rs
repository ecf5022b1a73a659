//! Symbols of a vmlinux that was not stripped: its ELF symbol table.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use object::elf;
use object::read::elf::{FileHeader, SectionHeader, Sym};

use super::pace::{Pace, no_memory};
use super::table::{LONGEST_NAME, MOST_SYMBOLS, Table, too_many};
use super::vmlinux::{KERNEL_START, damaged, header};
use crate::allocation::{check_room, push};
use crate::error::Error;

/// How many symbols are sorted between two calls of the watch.
const PART: usize = 1 << 14;

/// The order of symbols at one address, best first.
type Rank = (u8, u8, usize);
/// A symbol's address, its rank there, and its name.
type Found<'a> = (u64, Rank, &'a [u8]);

/// The symbols that lie in the kernel; `None` if the file has no symbol table, or none of them in it.
pub(super) fn read(bytes: &[u8], pace: &mut Pace<'_, '_>) -> Result<Option<Table>, Error> {
    let endian = object::LittleEndian;
    let sections = header(bytes)?.sections(endian, bytes).map_err(damaged)?;
    let symbols = sections.symbols(endian, bytes, elf::SHT_SYMTAB).map_err(damaged)?;
    if symbols.is_empty() {
        return Ok(None);
    }
    let strings = sections.section(symbols.string_section()).map_err(damaged)?;
    let strings = strings.data(endian, bytes).map_err(damaged)?;

    let mut found: Vec<Found<'_>> = Vec::new();
    for symbol in symbols.iter() {
        pace.spend(1)?;
        let kind = match symbol.st_type() {
            elf::STT_FUNC => 0,
            elf::STT_OBJECT => 1,
            elf::STT_NOTYPE => 2,
            _ => continue,
        };
        let address = symbol.st_value(endian);
        let name = name(strings, symbol.st_name(endian));
        pace.spend(name.len())?;
        if address < KERNEL_START || symbol.is_undefined(endian) || !is_for_people(name) {
            continue;
        }
        let binding = match symbol.st_bind() {
            elf::STB_GLOBAL => 0,
            elf::STB_WEAK => 1,
            _ => 2,
        };
        let underscores = name.iter().take_while(|&&byte| byte == b'_').count();
        if found.len() == MOST_SYMBOLS {
            return Err(too_many());
        }
        push(&mut found, (address, (kind, binding, underscores), name)).map_err(no_memory)?;
    }
    let table = sorted(&mut found, Table::new(bytes), pace)?;
    Ok((table.count() > 0).then_some(table))
}

/// Fills the table with the symbols in the order of their addresses and ranks, else as they were: parts are sorted, and then
/// merged.
fn sorted(found: &mut [Found<'_>], mut table: Table, pace: &mut Pace<'_, '_>) -> Result<Table, Error> {
    let key = |&(address, rank, _): &Found<'_>| (address, rank);
    // Sorting a part takes as much again at most.
    check_room((PART * size_of::<Found<'_>>()) as u64).map_err(no_memory)?;
    for part in found.chunks_mut(PART) {
        pace.look()?;
        part.sort_by_key(key);
    }
    let mut parts: Vec<&[Found<'_>]> = found.chunks(PART).collect();
    let first = |number: usize, part: &[Found<'_>]| part.first().map(|symbol| Reverse((key(symbol), number)));
    let mut firsts: BinaryHeap<_> = (0..)
        .zip(&parts)
        .filter_map(|(number, part)| first(number, part))
        .collect();
    while let Some(Reverse((_, number))) = firsts.pop() {
        if let Some((&(address, _, name), rest)) = parts[number].split_first() {
            pace.spend(1 + name.len())?;
            table.push(address, name)?;
            parts[number] = rest;
            firsts.extend(first(number, rest));
        }
    }
    Ok(table)
}

/// Empty if it is longer than a name can be.
fn name(strings: &[u8], at: u32) -> &[u8] {
    let rest = strings.get(at as usize..).unwrap_or_default();
    let rest = &rest[..rest.len().min(LONGEST_NAME + 1)];
    memchr::memchr(0, rest).map_or(&[], |end| &rest[..end])
}

/// Not a label that the assembler or modpost made.
fn is_for_people(name: &[u8]) -> bool {
    let made: [&[u8]; 5] = [b".L", b"$", b"__crc_", b"__kstrtab_", b"__ksymtab_"];
    !name.is_empty() && name.iter().all(u8::is_ascii_graphic) && !made.iter().any(|prefix| name.starts_with(prefix))
}
