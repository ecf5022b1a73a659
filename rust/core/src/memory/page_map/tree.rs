//! The tree of a page map: queries of ranges, and setting pages.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::memory::address::{PAGE_SIZE, Range, State};
use crate::memory::page_map::nodes::{
    BLOCK_PAGES, Block, BlockBits, Branch, FANOUT, Holds, Leaf, LeafBits, Position, mask,
};

/// The states of all pages. Pages and blocks are numbered from the start of memory.
#[derive(Clone)]
pub(super) struct Tree {
    pages: u64,
    private_pages: u64,
    /// Which of the branches have private and shared pages.
    root: Vec<Holds>,
    branches: Vec<Arc<Branch>>,
    /// Its reference count is the number of trees: the map's and its snapshots'. At 1, nothing else refers to branches
    /// or page bits. Declared after `branches`, so that a snapshot drops those first.
    holders: Arc<()>,
    /// Page bits that a leaf has no use for any more, for the next one that needs some, so that converting a page back
    /// and forth does not allocate each time. Nothing else refers to them.
    spare: Option<Arc<LeafBits>>,
}

impl Tree {
    #[track_caller]
    pub(super) fn new(size: u64, initial: State) -> Tree {
        assert!(
            size > 0 && size.is_multiple_of(PAGE_SIZE),
            "memory size {size:#x} is not a positive multiple of the page size {PAGE_SIZE:#x}"
        );
        let pages = size / PAGE_SIZE;
        let mut root = Vec::new();
        let mut branches = Vec::new();
        let mut left = pages.div_ceil(BLOCK_PAGES);
        while left > 0 {
            let mut branch = Branch {
                holds: Holds::default(),
                leaves: std::array::from_fn(|_| Leaf::default()),
            };
            for (i, leaf) in branch.leaves.iter_mut().enumerate() {
                let blocks = left.min(FANOUT as u64);
                if blocks == 0 {
                    break;
                }
                *leaf.holds.of_mut(initial) = mask(0, blocks);
                branch.holds.update(i, &leaf.holds);
                left -= blocks;
            }
            let i = branches.len() % FANOUT;
            if i == 0 {
                root.push(Holds::default());
            }
            root.last_mut().expect("one was pushed at 0").update(i, &branch.holds);
            branches.push(Arc::new(branch));
        }
        root.shrink_to_fit();
        branches.shrink_to_fit();
        Tree {
            pages,
            private_pages: if initial == State::Private { pages } else { 0 },
            root,
            branches,
            holders: Arc::new(()),
            spare: None,
        }
    }

    /// About how many bytes a new tree of so many blocks takes.
    pub(super) fn bytes_for(blocks: u64) -> u64 {
        blocks.div_ceil((FANOUT * FANOUT) as u64) * (size_of::<Branch>() + size_of::<Arc<Branch>>()) as u64
    }

    /// A copy for a snapshot. While it lives, this tree copies what both refer to before it changes it.
    pub(super) fn snapshot(&self) -> Tree {
        Tree {
            spare: None,
            ..self.clone()
        }
    }

    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    pub(super) fn private_pages(&self) -> u64 {
        self.private_pages
    }

    /// How many blocks there are. The last one may be shorter.
    pub(super) fn blocks(&self) -> u64 {
        self.pages.div_ceil(BLOCK_PAGES)
    }

    pub(super) fn size(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// The number of the page that holds `gpa`.
    #[track_caller]
    #[inline]
    pub(super) fn page(&self, gpa: u64) -> u64 {
        let page = gpa / PAGE_SIZE;
        assert!(
            page < self.pages,
            "gpa {gpa:#x} lies outside of memory, which ends at {:#x}",
            self.size()
        );
        page
    }

    /// The numbers of the first page of `range` and of the first page past it.
    #[track_caller]
    #[inline]
    pub(super) fn span(&self, range: Range) -> (u64, u64) {
        assert!(
            range.end() <= self.size(),
            "range {range} lies outside of memory, which ends at {:#x}",
            self.size()
        );
        (range.gpa() / PAGE_SIZE, range.end() / PAGE_SIZE)
    }

    fn leaf(&self, at: Position) -> &Leaf {
        &self.branches[at.branch].leaves[at.leaf]
    }

    #[inline]
    pub(super) fn block(&self, block: u64) -> Block<'_> {
        let at = Position::of(block);
        self.leaf(at).block(at.block)
    }

    /// How many pages a block has: all but the last one have [`BLOCK_PAGES`].
    fn block_pages(&self, block: u64) -> u64 {
        BLOCK_PAGES.min(self.pages - block * BLOCK_PAGES)
    }

    #[inline]
    pub(super) fn state(&self, page: u64) -> State {
        match self.block(page / BLOCK_PAGES) {
            Block::Uniform(state) => state,
            Block::Mixed(bits) => bits.state(page % BLOCK_PAGES),
        }
    }

    /// The state of all pages `[first, end)`; `None` if it is mixed.
    pub(super) fn uniform(&self, first: u64, end: u64) -> Option<State> {
        let block = first / BLOCK_PAGES;
        let start = block * BLOCK_PAGES;
        let state = self.uniform_in_block(block, first - start, BLOCK_PAGES.min(end - start))?;
        if end - start <= BLOCK_PAGES {
            return Some(state);
        }
        let Some(found) = self.find(state.other(), block + 1) else {
            return Some(state);
        };
        let start = found * BLOCK_PAGES;
        // That block has a page of the other state, but perhaps only at or past `end`.
        let uniform =
            end <= start || end - start < BLOCK_PAGES && self.uniform_in_block(found, 0, end - start) == Some(state);
        uniform.then_some(state)
    }

    /// The state of all of a block's pages `[from, to)`; `None` if it is mixed.
    #[inline]
    fn uniform_in_block(&self, block: u64, from: u64, to: u64) -> Option<State> {
        match self.block(block) {
            Block::Uniform(state) => Some(state),
            Block::Mixed(bits) => {
                let state = bits.state(from);
                (!bits.any(state.other(), from, to)).then_some(state)
            }
        }
    }

    /// The first block, not before `from`, that holds a page in `state`. `from` may be past the last block.
    pub(super) fn find(&self, state: State, from: u64) -> Option<u64> {
        let first = |mask: u64| mask.trailing_zeros() as usize;
        let mut at = Position::of(from);
        let branch = self.branches.get(at.branch)?;
        let blocks = branch.leaves[at.leaf].holds.of(state) & (u64::MAX << at.block);
        if blocks != 0 {
            at.block = first(blocks);
            return Some(at.number());
        }
        // `!1 << n` keeps the bits above n.
        let mut leaves = branch.holds.of(state) & (!1 << at.leaf);
        if leaves == 0 {
            let mut entry = at.branch / FANOUT;
            let mut branches = self.root[entry].of(state) & (!1 << (at.branch % FANOUT));
            while branches == 0 {
                entry += 1;
                branches = self.root.get(entry)?.of(state);
            }
            at.branch = entry * FANOUT + first(branches);
            leaves = self.branches[at.branch].holds.of(state);
        }
        at.leaf = first(leaves);
        at.block = first(self.leaf(at).holds.of(state));
        Some(at.number())
    }

    /// The frequent case of [`set`](Self::set): puts one page into state `to` and returns whether that changed it.
    /// `None`, with nothing done, if its block is or might become uniform or is shorter than others, if there is a
    /// snapshot, or if there is no such page.
    #[inline]
    pub(super) fn flip(&mut self, page: u64, to: State) -> Option<bool> {
        // `BlockBits::flip` is for whole blocks only.
        if page >= self.pages - self.pages % BLOCK_PAGES {
            return None;
        }
        let changed = match self.block(page / BLOCK_PAGES) {
            Block::Mixed(bits) if self.has_no_snapshot() => bits.flip(page % BLOCK_PAGES, to)?,
            _ => return None,
        };
        if changed {
            self.count_changed(1, to);
        }
        Some(changed)
    }

    /// Counts `pages` that changed to state `to`.
    fn count_changed(&mut self, pages: u64, to: State) {
        match to {
            State::Private => self.private_pages += pages,
            State::Shared => self.private_pages -= pages,
        }
    }

    /// Puts the pages `[first, end)` into state `to`. Returns how many were in the other state, and calls `changed`
    /// with each block that held one of them.
    pub(super) fn set(&mut self, first: u64, end: u64, to: State, mut changed: impl FnMut(u64)) -> u64 {
        // The range covers the blocks below this one to their end. The last block of memory may be a shorter one.
        let whole = if end == self.pages {
            self.blocks()
        } else {
            end / BLOCK_PAGES
        };
        let mut pages = 0;
        let mut page = first;
        while page < end {
            let block = page / BLOCK_PAGES;
            let start = block * BLOCK_PAGES;
            if page == start && block < whole {
                // Whole blocks, as far as they are in one leaf.
                let leaf = block - block % FANOUT as u64;
                let stop = whole.min(leaf + FANOUT as u64);
                let (count, mut blocks) = self.set_blocks(block, stop, to);
                pages += count;
                while blocks != 0 {
                    changed(leaf + u64::from(blocks.trailing_zeros()));
                    blocks &= blocks - 1;
                }
                page = end.min(stop * BLOCK_PAGES);
            } else {
                let stop = end.min(start + BLOCK_PAGES);
                let count = self.set_pages(block, page - start, stop - start, to);
                if count > 0 {
                    pages += count;
                    changed(block);
                }
                page = stop;
            }
        }
        self.count_changed(pages, to);
        pages
    }

    /// Puts the blocks `[first, end)`, which lie in one leaf, into state `to`. Returns how many pages changed, and
    /// the mask of the leaf's blocks that hold one that did.
    fn set_blocks(&mut self, first: u64, end: u64, to: State) -> (u64, u64) {
        let at = Position::of(first);
        let start = first - at.block as u64;
        let range = mask(first - start, end - start);
        let leaf = self.leaf(at);
        let changing = leaf.holds.of(to.other()) & range;
        if changing == 0 {
            return (0, 0);
        }
        let mut pages = u64::from(changing.count_ones()) * BLOCK_PAGES;
        if changing >> (end - start - 1) & 1 != 0 {
            pages -= BLOCK_PAGES - self.block_pages(end - 1);
        }
        // In a mixed block, those that are in state `to` already do not change.
        let mut mixed = changing & leaf.holds.mixed();
        while mixed != 0 {
            let block = mixed.trailing_zeros() as usize;
            mixed &= mixed - 1;
            if let Block::Mixed(bits) = leaf.block(block) {
                pages -= match to {
                    State::Private => bits.private_pages(),
                    State::Shared => self.block_pages(start + block as u64) - bits.private_pages(),
                };
            }
        }
        self.edit(at, |leaf, _| {
            *leaf.holds.of_mut(to) |= range;
            *leaf.holds.of_mut(to.other()) &= !range;
        });
        (pages, changing)
    }

    /// Puts a block's pages `[from, end)`, which are not all of its pages, into state `to`. Returns how many pages
    /// changed.
    #[inline]
    fn set_pages(&mut self, block: u64, from: u64, end: u64, to: State) -> u64 {
        let at = Position::of(block);
        let pages = self.block_pages(block);
        let mut bits = match self.block(block) {
            Block::Uniform(state) if state == to => return 0,
            Block::Uniform(_) => return self.mix(at, from, end, to),
            Block::Mixed(bits) => bits,
        };
        if !self.exclusive(at) {
            if !bits.any(to.other(), from, end) {
                return 0;
            }
            bits = self.unshare(at);
        }
        let changed = bits.set(from, end, to);
        if !bits.any(to.other(), 0, pages) {
            self.unmix(at, to);
        }
        changed
    }

    /// Puts the pages `[from, end)` of a block that is uniformly in the other state into state `to`.
    fn mix(&mut self, at: Position, from: u64, end: u64, to: State) -> u64 {
        let block = BlockBits::uniform(to.other(), self.block_pages(at.number()));
        let changed = block.set(from, end, to);
        self.edit(at, |leaf, spare| {
            // The spare bits may have any value, as those of uniform blocks may.
            let bits = leaf
                .bits
                .get_or_insert_with(|| spare.take().unwrap_or_else(LeafBits::new));
            Arc::make_mut(bits).0[at.block] = block;
            *leaf.holds.of_mut(to) |= 1 << at.block;
        });
        changed
    }

    /// Marks a mixed block as uniform: all of its pages are in `state` now.
    fn unmix(&mut self, at: Position, state: State) {
        self.edit(at, |leaf, _| *leaf.holds.of_mut(state.other()) &= !(1 << at.block));
    }

    /// Whether there is no snapshot at all, so that all page bits can be written in place. Cheaper than
    /// [`exclusive`](Self::exclusive).
    #[inline]
    fn has_no_snapshot(&self) -> bool {
        let alone = Arc::strong_count(&self.holders) == 1;
        // As in `exclusive`.
        fence(Ordering::Acquire);
        alone
    }

    /// Whether no snapshot refers to the page bits of a leaf, so that they can be written in place.
    fn exclusive(&self, at: Position) -> bool {
        let branch = &self.branches[at.branch];
        // A snapshot can refer to the bits themselves, or to their branch.
        let exclusive = Arc::strong_count(branch) == 1
            && branch.leaves[at.leaf]
                .bits
                .as_ref()
                .is_none_or(|bits| Arc::strong_count(bits) == 1);
        // Pairs with the release in the snapshot's drop: its reads happened before the writes that follow.
        fence(Ordering::Acquire);
        exclusive
    }

    /// The page bits of a mixed block, copied first if a snapshot refers to them, too.
    fn unshare(&mut self, at: Position) -> &BlockBits {
        let leaf = &mut Arc::make_mut(&mut self.branches[at.branch]).leaves[at.leaf];
        &Arc::make_mut(leaf.bits.as_mut().expect("a block is mixed")).0[at.block]
    }

    /// Changes a leaf and updates the levels above it. The change may take the spare bits.
    fn edit(&mut self, at: Position, change: impl FnOnce(&mut Leaf, &mut Option<Arc<LeafBits>>)) {
        let branch = Arc::make_mut(&mut self.branches[at.branch]);
        let leaf = &mut branch.leaves[at.leaf];
        change(leaf, &mut self.spare);
        if leaf.holds.mixed() == 0
            && let Some(mut bits) = leaf.bits.take()
            && Arc::get_mut(&mut bits).is_some()
        {
            self.spare = Some(bits);
        }
        branch.holds.update(at.leaf, &leaf.holds);
        self.root[at.branch / FANOUT].update(at.branch % FANOUT, &branch.holds);
    }

    /// Heap memory in bytes, including what snapshots refer to, too.
    pub(super) fn memory(&self) -> usize {
        /// The size of an `Arc`'s allocation: the two counts, and the value.
        fn counted<T>() -> usize {
            size_of::<T>() + (2 * size_of::<usize>()).max(align_of::<T>())
        }
        let leaves = self.branches.iter().flat_map(|branch| &branch.leaves);
        let bits = leaves.filter_map(|leaf| leaf.bits.as_ref()).chain(&self.spare);
        self.root.capacity() * size_of::<Holds>()
            + self.branches.capacity() * size_of::<Arc<Branch>>()
            + self.branches.len() * counted::<Branch>()
            + bits.count() * counted::<LeafBits>()
    }
}
