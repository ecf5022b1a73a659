//! The addresses of the symbols: an offset of 4 bytes for each. What it is from depends on the kernel.

use super::super::pace::no_memory;
use super::super::vmlinux::{KERNEL_START, Loaded};
use super::names::Names;
use super::steps::Steps;
use crate::allocation::reserve;
use crate::error::Error;

const WIDTH: usize = 4;

/// What an offset is from.
#[derive(Clone, Copy, Debug)]
enum Origin {
    /// The base, unsigned.
    Base(u64),
    /// A negative one is from the base, downwards: the address is base - 1 - offset. Others are absolute
    /// (CONFIG_KALLSYMS_ABSOLUTE_PERCPU).
    BaseOrAbsolute(u64),
    /// The address of the offset itself.
    Itself,
}

impl Origin {
    /// The address that an offset means, which is at `place`.
    fn address(self, offset: i32, place: u64) -> Option<u64> {
        match self {
            Self::Base(base) => base.checked_add(u64::from(offset.cast_unsigned())),
            Self::BaseOrAbsolute(_) if offset >= 0 => Some(u64::from(offset.cast_unsigned())),
            Self::BaseOrAbsolute(base) => base.checked_add(u64::from((-1 - offset).cast_unsigned())),
            Self::Itself => Some(place.wrapping_add_signed(i64::from(offset))),
        }
    }
}

/// The address of each name, from one of the places where a kernel may have put them: before the names, or after the
/// token index, which ends at `index_end`. `None` if nothing there can be the addresses of symbols, which ascend.
pub(super) fn find(
    segment: &Loaded<'_>,
    names: &Names<'_>,
    index_end: usize,
    steps: &mut Steps<'_, '_, '_>,
) -> Result<Option<Vec<u64>>, Error> {
    let size = names.count * WIDTH;
    let base = |at: usize| {
        let base = u64::from_le_bytes(*segment.bytes.get(at..)?.first_chunk()?);
        (base >= KERNEL_START).then_some(base)
    };
    // Before the names there are the number of symbols, and before that the base, 8 bytes each.
    let before = names
        .start
        .checked_sub(16 + size.next_multiple_of(8))
        .map(|at| (at, names.start - 16));
    let after = [4, 8].map(|alignment| {
        let at = index_end.next_multiple_of(alignment);
        Some((at, (at + size).next_multiple_of(8)))
    });
    for (at, base_at) in [before, after[0], after[1]].into_iter().flatten() {
        let origins = match base(base_at) {
            Some(base) => [Some(Origin::BaseOrAbsolute(base)), Some(Origin::Base(base))],
            None => [Some(Origin::Itself), None],
        };
        for origin in origins.into_iter().flatten() {
            let found = decode(segment, at, names.count, origin, steps)?;
            if found.is_some() {
                return Ok(found);
            }
        }
    }
    Ok(None)
}

/// The addresses, if those in the kernel ascend and are most of them.
fn decode(
    segment: &Loaded<'_>,
    at: usize,
    count: usize,
    origin: Origin,
    steps: &mut Steps<'_, '_, '_>,
) -> Result<Option<Vec<u64>>, Error> {
    let Some(offsets) = segment.bytes.get(at..at + count * WIDTH) else {
        return Ok(None);
    };
    let mut addresses = Vec::new();
    reserve(&mut addresses, count).map_err(no_memory)?;
    let mut highest = KERNEL_START;
    let mut inside = 0;
    for (index, offset) in offsets.as_chunks::<WIDTH>().0.iter().enumerate() {
        steps.pace.spend(1)?;
        let place = segment.address.wrapping_add((at + index * WIDTH) as u64);
        let Some(address) = origin.address(i32::from_le_bytes(*offset), place) else {
            return Ok(None);
        };
        if address >= KERNEL_START {
            if address < highest {
                return Ok(None);
            }
            highest = address;
            inside += 1;
        }
        addresses.push(address);
    }
    Ok((inside > count / 2).then_some(addresses))
}
