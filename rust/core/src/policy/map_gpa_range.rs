//! What the guest's registers say in an explicit request, KVM_HC_MAP_GPA_RANGE. Pure and total.
//!
//! KVM checks the alignment, that there is a page at all, and that the frame number does not wrap; through the
//! doorbell not even that. It never checks the attributes, and 2^52 pages pass. So all of it is checked here.

use crate::errno::Errno;
use crate::hypervisor::exit::Hypercall;
use crate::hypervisor::hypercall::{
    KVM_MAP_GPA_RANGE_ENCRYPTED as ENCRYPTED, KVM_MAP_GPA_RANGE_PAGE_SIZE as PAGE_SIZE_HINT,
};
use crate::memory::address::{PAGE_SIZE, Range, State};
use crate::memory::views::Views;

/// A well-formed explicit request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapGpaRange {
    /// Which pages, without the shared bit.
    pub range: Range,
    /// What they are to become.
    pub to: State,
    /// The guest's hint: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// RDX as it was.
    pub raw: u64,
}

/// Reads the registers of a request.
///
/// # Errors
/// EINVAL for an unaligned gpa, no pages, a range that wraps or leaves memory, and unknown attribute bits.
pub fn parse(call: &Hypercall, views: &Views) -> Result<MapGpaRange, Errno> {
    let [gpa, pages, raw] = call.args;
    let einval = Errno(libc::EINVAL);
    let size = pages.checked_mul(PAGE_SIZE).ok_or(einval)?;
    let range = views.range(gpa, size).ok_or(einval)?;
    let page_size = match raw & PAGE_SIZE_HINT {
        0 => PAGE_SIZE,
        1 => 2 << 20,
        2 => 1 << 30,
        _ => return Err(einval),
    };
    if raw & !(PAGE_SIZE_HINT | ENCRYPTED) != 0 {
        return Err(einval);
    }
    let to = match raw & ENCRYPTED {
        0 => State::Shared,
        _ => State::Private,
    };
    Ok(MapGpaRange {
        range,
        to,
        page_size,
        raw,
    })
}

/// The attribute word that asks for this: RDX, as [`parse`] reads it. `None` for a page size that has no hint.
pub const fn attributes(to: State, page_size: u64) -> Option<u64> {
    let hint = match page_size {
        PAGE_SIZE => 0,
        0x20_0000 => 1,
        0x4000_0000 => 2,
        _ => return None,
    };
    match to {
        State::Private => Some(ENCRYPTED | hint),
        State::Shared => Some(hint),
    }
}
