//! Views: the guest-physical addresses at which the guest sees its memory, and what an address refers to.

use crate::memory::address::{PAGE_SIZE, Range, State};

/// The addresses at which the guest sees its memory.
///
/// Without a shared bit there is one view. With one, each page has a private view at its gpa and a shared view at
/// its gpa with the bit set, as in a TDX guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Views {
    size: u64,
    /// 0 where there is one view.
    shared_mask: u64,
}

/// What a guest-physical address in memory refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The address without the shared bit.
    pub gpa: u64,
    /// The view that the address lies in; `None` where there is only one.
    pub view: Option<State>,
}

impl Place {
    /// The gpa of the page, without the shared bit.
    pub fn page(&self) -> u64 {
        self.gpa & !(PAGE_SIZE - 1)
    }
}

impl Views {
    /// The views of `size` bytes of memory, which must be at most `1 << shared_bit`.
    pub fn new(size: u64, shared_bit: Option<u32>) -> Self {
        let shared_mask = shared_bit.map_or(0, |bit| 1 << bit);
        Self { size, shared_mask }
    }

    /// Bytes of guest memory.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The shared bit's mask, 0 where there is none.
    #[inline]
    pub fn shared_mask(&self) -> u64 {
        self.shared_mask
    }

    /// Whether a page has two views.
    pub fn split(&self) -> bool {
        self.shared_mask != 0
    }

    /// The first address past memory and all its views.
    pub fn end(&self) -> u64 {
        self.shared_mask() + self.size
    }

    /// What `gpa` refers to; `None` outside of memory and its views.
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

    /// The range of `size` bytes at `gpa`, without the shared bit; `None` if it is not page aligned, empty, or not all
    /// in memory.
    pub fn range(&self, gpa: u64, size: u64) -> Option<Range> {
        let range = Range::new(gpa & !self.shared_mask(), size)?;
        (range.end() <= self.size).then_some(range)
    }

    /// The address of `gpa` in the view of `state`.
    pub fn address(&self, gpa: u64, state: State) -> u64 {
        match state {
            State::Private => gpa,
            State::Shared => gpa | self.shared_mask(),
        }
    }

    /// The addresses of `range` in the view of `state`.
    pub fn view(&self, range: Range, state: State) -> Range {
        // Memory ends at or below the shared bit, so this is always a valid range.
        Range::new(self.address(range.gpa(), state), range.size()).unwrap_or(range)
    }
}
