//! Views: the guest-physical addresses at which the guest sees its memory, and what an address refers to.

use crate::memory::address::{PAGE_SIZE, Range, State};

/// x86 has no guest-physical address from here on.
pub(crate) const PHYSICAL_END: u64 = 1 << 52;

/// The bit of a guest-physical address that tells the two views of a page apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewBit {
    /// Its number.
    pub bit: u32,
    /// The view whose addresses have it set: shared as in a TDX guest, private as in a SEV guest.
    pub set: State,
}

/// Where memory is, and the addresses at which the guest sees it.
///
/// Without a view bit there is one view. With one, each page has two: at its gpa, and at its gpa with the bit set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Views {
    /// The first gpa past memory.
    end: u64,
    /// Addresses below `end` that are no memory.
    hole: Option<Range>,
    /// The view bit's mask, 0 where there is one view.
    mask: u64,
    /// The view whose addresses have the bit set.
    set: State,
}

/// What a guest-physical address in memory refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The address without the view bit.
    pub gpa: u64,
    /// The view that the address lies in; `None` where there is only one.
    pub view: Option<State>,
}

impl Place {
    /// The gpa of the page, without the view bit.
    pub fn page(&self) -> u64 {
        self.gpa & !(PAGE_SIZE - 1)
    }
}

impl Views {
    /// The views of memory that ends at `end`, which must be at most `1 << bit`, without `hole`, which lies inside.
    pub fn new(end: u64, hole: Option<Range>, bit: Option<ViewBit>) -> Self {
        Self {
            end,
            hole,
            mask: bit.map_or(0, |view| 1 << view.bit),
            set: bit.map_or(State::Shared, |view| view.set),
        }
    }

    /// Bytes of guest memory.
    pub fn size(&self) -> u64 {
        self.end - self.hole.map_or(0, |hole| hole.size())
    }

    /// The first gpa past memory, without the view bit.
    #[inline]
    pub fn memory_end(&self) -> u64 {
        self.end
    }

    /// Addresses below [`memory_end`](Self::memory_end) that are no memory.
    pub fn hole(&self) -> Option<Range> {
        self.hole
    }

    /// The ranges that are memory, ascending: one, or one below the hole and one above it.
    pub fn ram(&self) -> Vec<Range> {
        let (start, end) = self.hole.map_or((self.end, self.end), |hole| (hole.gpa(), hole.end()));
        let below = Range::new(0, start);
        let above = Range::new(end, self.end - end);
        below.into_iter().chain(above).collect()
    }

    /// All of the memory that `range`, a part of it, is in: below the hole, or above it.
    pub(crate) fn around(&self, range: Range) -> Option<Range> {
        match self.hole {
            Some(hole) if range.gpa() < hole.gpa() => Range::new(0, hole.gpa()),
            Some(hole) => Range::new(hole.end(), self.end - hole.end()),
            None => Range::new(0, self.end),
        }
    }

    /// The view bit's mask, 0 where there is one view.
    #[inline]
    pub fn mask(&self) -> u64 {
        self.mask
    }

    /// The number of the bit that selects the view of `state`; `None` if none does.
    pub fn bit_of(&self, state: State) -> Option<u32> {
        (self.split() && state == self.set).then(|| self.mask.trailing_zeros())
    }

    /// Whether a page has two views.
    pub fn split(&self) -> bool {
        self.mask != 0
    }

    /// The first address past memory and all its views.
    pub fn end(&self) -> u64 {
        self.mask + self.end
    }

    /// Whether all of `range`, which has no view bit, is memory.
    #[inline]
    pub fn holds(&self, range: Range) -> bool {
        range.end() <= self.end && !self.hole.is_some_and(|hole| hole.overlaps(&range))
    }

    /// What `gpa` refers to; `None` outside of memory and its views.
    pub fn locate(&self, gpa: u64) -> Option<Place> {
        let stripped = gpa & !self.mask;
        let view = match (self.split(), gpa & self.mask != 0) {
            (false, _) => None,
            (true, true) => Some(self.set),
            (true, false) => Some(self.set.other()),
        };
        let memory = stripped < self.end && !self.hole.is_some_and(|hole| hole.contains(stripped));
        memory.then_some(Place { gpa: stripped, view })
    }

    /// The range of `size` bytes at `gpa`, without the view bit; `None` if it is not page aligned, empty, or not all
    /// memory.
    pub fn range(&self, gpa: u64, size: u64) -> Option<Range> {
        Range::new(gpa & !self.mask, size).filter(|range| self.holds(*range))
    }

    /// Whether the `size` bytes at `gpa` are page-aligned and no part of them is memory, in either view.
    pub fn is_elsewhere(&self, gpa: u64, size: u64) -> bool {
        let Some(range) = Range::new(gpa & !self.mask, size).filter(|range| range.end() <= PHYSICAL_END) else {
            return false;
        };
        let views_of = |ram: &Range| [State::Shared, State::Private].map(|state| self.view(*ram, state));
        !self.ram().iter().flat_map(views_of).any(|view| view.overlaps(&range))
    }

    /// The address of `gpa` in the view of `state`.
    pub fn address(&self, gpa: u64, state: State) -> u64 {
        match state == self.set {
            true => gpa | self.mask,
            false => gpa,
        }
    }

    /// The addresses of `range` in the view of `state`.
    pub fn view(&self, range: Range, state: State) -> Range {
        // Memory ends at or below the view bit, so this is always a valid range.
        Range::new(self.address(range.gpa(), state), range.size()).unwrap_or(range)
    }
}
