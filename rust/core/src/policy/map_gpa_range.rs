//! Decodes and checks the registers of an explicit request (KVM_HC_MAP_GPA_RANGE). Pure, and total over all values.
//!
//! KVM checks that the gpa is aligned, that there is at least one page, and that the frame number does not wrap; of a
//! doorbell's registers it checks nothing. It does not check the attributes, and it lets 2^52 pages pass. So everything
//! is checked here.

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
    /// The pages, without the view bit.
    pub range: Range,
    /// The state that they are to become.
    pub to: State,
    /// The guest's page-size hint in bytes: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// RDX, unchanged.
    pub raw: u64,
}

/// Decodes the registers of a request. `None`: it asks to share what is no memory, such as a device's range. Firmware does
/// that before it accesses a device, and there is nothing to do for it.
///
/// # Errors
/// EINVAL for an unaligned gpa, no pages, a range that wraps, that holds memory and something else, or that is no memory
/// and is to be private, and for unknown attribute bits.
#[inline]
pub fn parse(call: &Hypercall, views: &Views) -> Result<Option<MapGpaRange>, Errno> {
    let [gpa, pages, raw] = call.args;
    let einval = Errno(libc::EINVAL);
    let size = pages.checked_mul(PAGE_SIZE).ok_or(einval)?;
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
    match views.range(gpa, size) {
        Some(range) => Ok(Some(MapGpaRange {
            range,
            to,
            page_size,
            raw,
        })),
        None if to == State::Shared && views.is_elsewhere(gpa, size) => Ok(None),
        None => Err(einval),
    }
}

/// The attributes (RDX) that ask for this; the inverse of [`parse`]. `None` for a page size without a hint.
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
