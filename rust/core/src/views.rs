//! Guest-physical addresses: which page they mean, and through which view.

use crate::attributes::{PAGE_SIZE, Range, State};

/// Where the guest's memory appears in its physical address space.
///
/// Without a shared bit there is one view. With one, each page has a private view at its gpa and a shared view at
/// its gpa with the bit, as in a TDX guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Views {
    size: u64,
    /// 0 where there is one view.
    shared_mask: u64,
}

/// A place in guest memory, as an address names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The address without the shared bit.
    pub gpa: u64,
    /// The view that was used; `None` where there is only one.
    pub view: Option<State>,
}

impl Place {
    /// The page's gpa.
    pub fn page(&self) -> u64 {
        self.gpa & !(PAGE_SIZE - 1)
    }
}

impl Views {
    /// Memory of this size, which ends at or before the bit.
    pub fn new(size: u64, shared_bit: Option<u32>) -> Self {
        let shared_mask = shared_bit.map_or(0, |bit| 1 << bit);
        Self { size, shared_mask }
    }

    /// Bytes of guest memory.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The bit's mask, 0 where there is none.
    #[inline]
    pub fn shared_mask(&self) -> u64 {
        self.shared_mask
    }

    /// Whether accesses choose their view.
    pub fn split(&self) -> bool {
        self.shared_mask != 0
    }

    /// The end of everything: memory and its views.
    pub fn end(&self) -> u64 {
        self.shared_mask() + self.size
    }

    /// What `gpa` means, if it lies in memory.
    pub fn locate(&self, gpa: u64) -> Option<Place> {
        let mask = self.shared_mask();
        let stripped = gpa & !mask;
        let view = match (self.split(), gpa & mask != 0) {
            (false, _) => None,
            (true, true) => Some(State::Shared),
            (true, false) => Some(State::Private),
        };
        (stripped < self.size).then_some(Place { gpa: stripped, view })
    }

    /// The range if it is page-aligned, not empty and inside memory. The shared bit of its start is stripped.
    pub fn range(&self, gpa: u64, size: u64) -> Option<Range> {
        let range = Range::new(gpa & !self.shared_mask(), size)?;
        (range.end() <= self.size).then_some(range)
    }

    /// The address at which `state`'s view of `gpa` appears.
    pub fn address(&self, gpa: u64, state: State) -> u64 {
        match state {
            State::Private => gpa,
            State::Shared => gpa | self.shared_mask(),
        }
    }

    /// `range`, where `state`'s view of it appears.
    pub fn view(&self, range: Range, state: State) -> Range {
        // Memory ends at or before the bit, so that setting it can neither wrap nor unalign.
        Range::new(self.address(range.gpa(), state), range.size()).unwrap_or(range)
    }
}
