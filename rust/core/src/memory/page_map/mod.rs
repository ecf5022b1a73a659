//! Which pages of guest memory are private and which are shared.
//!
//! KVM has an ioctl to set memory attributes and none to read them, so [`AttributeMap`] is the only record of them. It
//! is exact for each 4 KiB page and answers queries about ranges without walking pages.
//!
//! # Structure
//!
//! A tree with a fan-out of 64 over blocks of 2 MiB:
//!
//! | level      | covers  | has                                                                          |
//! |------------|---------|------------------------------------------------------------------------------|
//! | root entry | 512 GiB | which of its branches hold private pages, and which hold shared ones         |
//! | branch     | 8 GiB   | the same of its leaves                                                       |
//! | leaf       | 128 MiB | the same of its blocks; one bit for each page if at least one block is mixed |
//! | block      | 2 MiB   | nothing of its own: the leaf's two bits say private, shared, or mixed        |
//!
//! A query of a range starts at a block, goes up only as far as the answer needs, and then down again. So its cost
//! depends on the depth, which is fixed, and hardly on the size of the guest. The page bits of a block that is not
//! mixed are never read and may have any value: setting whole blocks writes only the masks above them, and a leaf
//! without a mixed block has no page bits at all.
//!
//! In the worst case, a mixed block in each leaf, a TiB of guest memory takes 32.1 MiB of page bits, 4 MiB of stamps,
//! and 0.2 MiB for the rest.
//!
//! Branches and page bits are reference counted. If a [`Snapshot`] refers to them, too, they are copied before they are
//! written. Page bits are atomics so that the map can write them in place through a shared reference: two plain loads
//! tell whether a snapshot refers to them. [`Arc::make_mut`](std::sync::Arc::make_mut) would take locked instructions,
//! and most of the time of a change.

mod nodes;
mod runs;
mod tree;

use std::fmt;

use crate::memory::address::{PAGE_SIZE, Range, Run, State};
use nodes::BLOCK_PAGES;
use runs::Runs;
use tree::Tree;

/// The exact state of each page of a guest's memory, which starts at guest-physical address 0.
///
/// Takes at most about 37 MiB for each TiB of guest memory, whichever pages are private and however often they change.
///
/// ```
/// use pagegate_core::memory::address::{Range, State};
/// use pagegate_core::memory::page_map::AttributeMap;
///
/// let mut map = AttributeMap::new(64 << 20, State::Shared);
/// let range = Range::new(0x1000, 0x2000).unwrap();
/// assert_eq!(map.set(range, State::Private), 0x2000);
/// assert_eq!(map.uniform(range), Some(State::Private));
/// assert_eq!(map.runs().count(), 3);
/// ```
pub struct AttributeMap {
    tree: Tree,
    generation: u64,
    /// For each block, the generation of the last change of one of its pages. Allocated zeroed, so parts that are never
    /// written take no memory.
    stamps: Vec<u64>,
}

/// A copy of an [`AttributeMap`] as it was at some time.
///
/// Taking or cloning one copies about a pointer for each 8 GiB of guest memory. While it lives, the map copies what it
/// changes, once: at most 4 KiB for each 128 MiB of guest memory.
#[derive(Clone)]
pub struct Snapshot {
    tree: Tree,
    generation: u64,
}

/// The methods that a map and its snapshots both have.
macro_rules! queries {
    ($name:literal) => {
        /// Size of guest memory in bytes.
        pub fn size(&self) -> u64 {
            self.tree.size()
        }

        /// The state of the page that holds the byte at `gpa`.
        ///
        /// # Panics
        ///
        /// If `gpa` is not below [`size`](Self::size).
        #[track_caller]
        #[inline]
        pub fn state(&self, gpa: u64) -> State {
            self.tree.state(self.tree.page(gpa))
        }

        /// The state that all pages of `range` are in; `None` if it is mixed. Does not walk pages.
        ///
        /// # Panics
        ///
        /// If `range` ends past [`size`](Self::size).
        #[track_caller]
        #[inline]
        pub fn uniform(&self, range: Range) -> Option<State> {
            let (first, end) = self.tree.span(range);
            match range.size() {
                PAGE_SIZE => Some(self.tree.state(first)),
                _ => self.tree.uniform(first, end),
            }
        }

        /// How many bytes are private: a multiple of [`PAGE_SIZE`]. The rest of memory is shared.
        pub fn private_bytes(&self) -> u64 {
            self.tree.private_pages() * PAGE_SIZE
        }

        /// A counter of changes, 0 for a new map: the calls of [`AttributeMap::set`] that changed something and those
        /// of [`AttributeMap::disturb`].
        pub fn generation(&self) -> u64 {
            self.generation
        }

        /// All of memory as the fewest possible runs, ascending: adjacent runs differ in state.
        #[inline]
        pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
            Runs::new(&self.tree, 0, self.tree.pages())
        }

        /// As [`runs`](Self::runs), of `range` only; the first and the last run are cut to it.
        ///
        /// # Panics
        ///
        /// If `range` ends past [`size`](Self::size).
        #[track_caller]
        #[inline]
        pub fn runs_in(&self, range: Range) -> impl Iterator<Item = Run> + '_ {
            let (first, end) = self.tree.span(range);
            Runs::new(&self.tree, first, end)
        }

        fn summary(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct($name)
                .field("size", &self.size())
                .field("private_bytes", &self.private_bytes())
                .field("generation", &self.generation)
                .finish_non_exhaustive()
        }
    };
}

impl AttributeMap {
    /// A map of `size_bytes` of memory with all pages in state `initial`.
    ///
    /// # Panics
    ///
    /// If `size_bytes` is 0 or not a multiple of [`PAGE_SIZE`].
    #[track_caller]
    pub fn new(size_bytes: u64, initial: State) -> AttributeMap {
        let tree = Tree::new(size_bytes, initial);
        let stamps = vec![0; tree.blocks() as usize];
        AttributeMap {
            tree,
            generation: 0,
            stamps,
        }
    }

    /// About how many bytes a new map of `size_bytes` of memory takes.
    pub(crate) fn bytes_for(size_bytes: u64) -> u64 {
        let blocks = size_bytes.div_ceil(PAGE_SIZE * BLOCK_PAGES);
        blocks * size_of::<u64>() as u64 + Tree::bytes_for(blocks)
    }

    queries!("AttributeMap");

    /// Puts all pages of `range` into state `to`. Returns how many bytes were in the other state before, 0 to
    /// `range.size()`.
    ///
    /// If that is not 0, the [`generation`](Self::generation) goes up by 1, and the blocks of the pages that
    /// changed are stamped with it.
    ///
    /// # Panics
    ///
    /// If `range` ends past [`size`](Self::size). Nothing has changed then.
    #[track_caller]
    #[inline]
    pub fn set(&mut self, range: Range, to: State) -> u64 {
        // By far the most frequent change: one page in a block that stays mixed.
        let page = range.gpa() / PAGE_SIZE;
        if range.size() == PAGE_SIZE
            && let Some(changed) = self.tree.flip(page, to)
        {
            if !changed {
                return 0;
            }
            self.generation += 1;
            self.stamps[(page / BLOCK_PAGES) as usize] = self.generation;
            return PAGE_SIZE;
        }
        self.set_several(range, to)
    }

    #[track_caller]
    fn set_several(&mut self, range: Range, to: State) -> u64 {
        let (first, end) = self.tree.span(range);
        let stamp = self.generation + 1;
        let stamps = &mut self.stamps;
        let pages = self.tree.set(first, end, to, |block| stamps[block as usize] = stamp);
        if pages > 0 {
            self.generation = stamp;
        }
        pages * PAGE_SIZE
    }

    /// Counts and stamps a change of `range` that was undone: in the meantime a vCPU may have seen its pages in either
    /// state.
    ///
    /// # Panics
    ///
    /// If `range` ends past [`size`](Self::size).
    #[track_caller]
    pub fn disturb(&mut self, range: Range) {
        let (first, end) = self.tree.span(range);
        self.generation += 1;
        for block in first / BLOCK_PAGES..end.div_ceil(BLOCK_PAGES) {
            self.stamps[block as usize] = self.generation;
        }
    }

    /// Whether a page of the 2 MiB block that holds the byte at `gpa` was changed after `generation`, even if it was
    /// changed back.
    ///
    /// # Panics
    ///
    /// If `gpa` is not below [`size`](Self::size).
    #[track_caller]
    pub fn changed_since(&self, gpa: u64, generation: u64) -> bool {
        self.stamps[(self.tree.page(gpa) / BLOCK_PAGES) as usize] > generation
    }

    /// A copy of the map as it is now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            tree: self.tree.snapshot(),
            generation: self.generation,
        }
    }

    /// The map's heap memory in bytes. Counts what it shares with snapshots, but not what only they use.
    pub fn memory(&self) -> usize {
        self.stamps.capacity() * size_of::<u64>() + self.tree.memory()
    }
}

impl Snapshot {
    queries!("Snapshot");
}

impl fmt::Debug for AttributeMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.summary(f)
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.summary(f)
    }
}
