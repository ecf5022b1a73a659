//! Guest-physical addresses: pages, ranges of pages, and the two states of a page.

use std::fmt;

use crate::allocation::push;
use crate::errno::Errno;

/// The size of a page in bytes. Each page has a state.
pub const PAGE_SIZE: u64 = 4096;

/// The size of a block in bytes. One KVM_SET_MEMORY_ATTRIBUTES is for pages of one block: the ioctl cannot be
/// interrupted, and every vCPU that faults in its range waits for it.
pub(crate) const BLOCK: u64 = 2 << 20;

/// Whether a page is private to the guest or shared with the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// Ordinary host memory that guest and host can access.
    Shared = 0,
    /// Memory of the guest alone: the host does not read or write it.
    Private = 1,
}

impl State {
    /// The state's name in messages, events and Python: `"shared"` or `"private"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Shared => "shared",
            State::Private => "private",
        }
    }

    /// The opposite state.
    pub const fn other(self) -> State {
        match self {
            State::Shared => State::Private,
            State::Private => State::Shared,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A range of guest-physical addresses, in bytes. Both ends are page aligned, it is not empty, and its end is below
/// 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    gpa: u64,
    size: u64,
}

impl Range {
    /// The range of `size` bytes that starts at `gpa`.
    ///
    /// `None` if either is not a multiple of [`PAGE_SIZE`], if `size` is 0, or if `gpa + size` overflows a `u64`.
    pub const fn new(gpa: u64, size: u64) -> Option<Range> {
        let aligned = gpa.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE);
        if aligned && size > 0 && gpa.checked_add(size).is_some() {
            Some(Range { gpa, size })
        } else {
            None
        }
    }

    /// The pages that hold the bytes `[at, at + len)`; `None` if there are none, or they end above 2^64.
    pub(crate) fn holding(at: u64, len: u64) -> Option<Range> {
        let start = at - at % PAGE_SIZE;
        let end = at.checked_add(len)?.checked_next_multiple_of(PAGE_SIZE)?;
        Range::new(start, end.checked_sub(start)?)
    }

    /// The pages numbered `first` to `end - 1`. There must be at least one, and `end * PAGE_SIZE` must not overflow.
    pub(crate) const fn of_pages(first: u64, end: u64) -> Range {
        Range {
            gpa: first * PAGE_SIZE,
            size: (end - first) * PAGE_SIZE,
        }
    }

    /// First address, in bytes.
    pub const fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes, at least [`PAGE_SIZE`].
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// First address past the range, in bytes.
    pub const fn end(&self) -> u64 {
        self.gpa + self.size
    }

    /// Length in pages, at least 1.
    pub const fn pages(&self) -> u64 {
        self.size / PAGE_SIZE
    }

    /// Whether the byte at `gpa`, which need not be aligned, lies in the range.
    pub const fn contains(&self, gpa: u64) -> bool {
        self.gpa <= gpa && gpa < self.end()
    }

    /// Whether the two ranges have a page in common.
    pub const fn overlaps(&self, other: &Range) -> bool {
        self.gpa < other.end() && other.gpa < self.end()
    }

    /// Whether all of its pages are in one block.
    #[inline]
    pub(crate) const fn in_one_block(&self) -> bool {
        self.gpa / BLOCK == (self.end() - 1) / BLOCK
    }

    /// The parts of the range that are in one block each, ascending.
    pub(crate) fn blocks(self) -> impl Iterator<Item = Range> {
        let mut start = self.gpa;
        std::iter::from_fn(move || {
            let end = (start - start % BLOCK + BLOCK).min(self.end());
            let part = Range::new(start, end.checked_sub(start)?)?;
            start = end;
            Some(part)
        })
    }

    /// The smallest range that contains both.
    pub(crate) fn hull(&self, other: &Range) -> Range {
        let gpa = self.gpa.min(other.gpa);
        Range {
            gpa,
            size: self.end().max(other.end()) - gpa,
        }
    }

    /// The pages that the two ranges have in common; `None` if there are none.
    pub fn intersect(&self, other: &Range) -> Option<Range> {
        let gpa = self.gpa.max(other.gpa);
        let end = self.end().min(other.end());
        (gpa < end).then(|| Range { gpa, size: end - gpa })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.gpa, self.end())
    }
}

/// Adjacent pages in the same state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The pages.
    pub range: Range,
    /// Their state.
    pub state: State,
}

impl Run {
    /// A list of as many runs as a guest has made.
    ///
    /// # Errors
    /// ENOMEM.
    pub(crate) fn list(runs: impl Iterator<Item = Run>) -> Result<Vec<Run>, Errno> {
        let mut list = Vec::new();
        for run in runs {
            push(&mut list, run)?;
        }
        Ok(list)
    }
}
