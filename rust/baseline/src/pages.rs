//! Ranges of pages, and the addresses at which the guest sees them.

use std::io;

/// The size of a page, in bytes.
pub(crate) const PAGE_SIZE: u64 = 4096;

/// A range of pages: not empty, and page aligned at both ends.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages {
    pub start: u64,
    /// The first address past them.
    pub end: u64,
}

impl Pages {
    pub(crate) fn new(start: u64, size: u64) -> io::Result<Self> {
        let aligned = start.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE);
        match start.checked_add(size) {
            Some(end) if aligned && start < end => Ok(Self { start, end }),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    pub(crate) fn size(&self) -> u64 {
        self.end - self.start
    }
}

/// The addresses at which the guest sees its memory. With a shared bit each page has a private and a shared view.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Views {
    memory: u64,
    /// 0 without a shared bit.
    mask: u64,
}

impl Views {
    pub(crate) fn new(memory: u64, shared_bit: Option<u32>) -> Self {
        let mask = shared_bit.map_or(0, |bit| 1 << bit);
        Self { memory, mask }
    }

    /// The address of `gpa` in its private or its shared view.
    pub(crate) fn address(&self, gpa: u64, private: bool) -> u64 {
        if private { gpa } else { gpa | self.mask }
    }

    /// For an address that the guest used: the gpa without the shared bit, and whether it is in the private view.
    /// `None` outside of memory, and with only one view.
    pub(crate) fn locate(&self, address: u64) -> Option<(u64, bool)> {
        let gpa = address & !self.mask;
        (self.mask != 0 && gpa < self.memory).then_some((gpa, address & self.mask == 0))
    }
}
