//! The nodes of a page map's tree, from the page bits of a block up to a branch.

use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::address::State;

/// Pages in a block (2 MiB).
pub(super) const BLOCK_PAGES: u64 = 512;
/// Words of page bits in a block.
const BLOCK_WORDS: usize = 8;
/// Children of a leaf (blocks), of a branch (leaves) and of a root entry (branches): one bit of a mask each.
pub(super) const FANOUT: usize = 64;

/// The state that the lowest bit of `bits` stands for.
pub(super) const fn state_of(bits: u64) -> State {
    if bits & 1 == 0 { State::Shared } else { State::Private }
}

/// The word of 64 pages in `state`.
pub(super) const fn word_of(state: State) -> u64 {
    match state {
        State::Shared => 0,
        State::Private => u64::MAX,
    }
}

/// The bits `[from, to)` of a word; `from < 64`, `1 <= to <= 64`.
pub(super) const fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX << from) & (u64::MAX >> (64 - to))
}

/// Reads 64 page bits. Relaxed is enough: the map writes only through `&mut`, so no write runs at the same time.
pub(super) fn get(word: &AtomicU64) -> u64 {
    word.load(Ordering::Relaxed)
}

/// One bit for each page of a block, set if the page is private. Bits past the end of memory are clear.
///
/// Pages are numbered from the start of the block. Bits are written through a shared reference: the caller makes sure
/// that no snapshot refers to them.
#[derive(Default)]
pub(super) struct BlockBits([AtomicU64; BLOCK_WORDS]);

impl BlockBits {
    /// A block whose `pages` pages are all in `state`.
    pub(super) fn uniform(state: State, pages: u64) -> BlockBits {
        let bits = BlockBits(std::array::from_fn(|_| AtomicU64::new(word_of(state))));
        if pages < BLOCK_PAGES {
            bits.set(pages, BLOCK_PAGES, State::Shared);
        }
        bits
    }

    /// The words from the one that holds `page` on.
    #[inline]
    pub(super) fn words_from(&self, page: u64) -> slice::Iter<'_, AtomicU64> {
        self.0[(page / 64) as usize..].iter()
    }

    #[inline]
    pub(super) fn state(&self, page: u64) -> State {
        state_of(get(&self.0[(page / 64) as usize]) >> (page % 64))
    }

    /// How many pages are private.
    pub(super) fn private_pages(&self) -> u64 {
        self.0.iter().map(|word| u64::from(get(word).count_ones())).sum()
    }

    /// The words that hold the pages `[from, to)`, each with the mask of their bits.
    #[inline]
    fn masked(&self, from: u64, to: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (first, last) = (from / 64, (to - 1) / 64);
        (first..last + 1).map(move |word| {
            let from = if word == first { from % 64 } else { 0 };
            let to = if word == last { (to - 1) % 64 + 1 } else { 64 };
            (&self.0[word as usize], mask(from, to))
        })
    }

    /// Whether one of the pages `[from, to)` is in `state`.
    #[inline]
    pub(super) fn any(&self, state: State, from: u64, to: u64) -> bool {
        let other = word_of(state.other());
        self.masked(from, to)
            .any(|(word, mask)| (get(word) ^ other) & mask != 0)
    }

    /// Puts the pages `[from, to)` into `state`. Returns how many were in the other one.
    #[inline]
    pub(super) fn set(&self, from: u64, to: u64, state: State) -> u64 {
        let mut changed = 0;
        for (word, mask) in self.masked(from, to) {
            let change = (get(word) ^ word_of(state)) & mask;
            word.store(get(word) ^ change, Ordering::Relaxed);
            changed += u64::from(change.count_ones());
        }
        changed
    }

    /// Puts one page into state `to` and returns whether that changed it. `None`, with nothing done, if the block might
    /// become uniform. Only for blocks of [`BLOCK_PAGES`]: in a shorter one, the last word has bits of no page, and so
    /// does not show whether it is uniform.
    #[inline]
    pub(super) fn flip(&self, page: u64, to: State) -> Option<bool> {
        let word = &self.0[(page / 64) as usize];
        let (old, bit) = (get(word), 1 << (page % 64));
        if (old ^ word_of(to)) & bit == 0 {
            return Some(false);
        }
        let new = old ^ bit;
        // If this word becomes uniform, the whole block may have.
        if new == word_of(to) {
            return None;
        }
        word.store(new, Ordering::Relaxed);
        Some(true)
    }
}

impl Clone for BlockBits {
    fn clone(&self) -> BlockBits {
        BlockBits(std::array::from_fn(|i| AtomicU64::new(get(&self.0[i]))))
    }
}

/// Which of a node's 64 children hold at least one private page, and which at least one shared page. A child with
/// both bits is mixed; a child with neither lies past the end of memory.
#[derive(Clone, Copy, Default)]
pub(super) struct Holds {
    pub(super) private: u64,
    pub(super) shared: u64,
}

impl Holds {
    pub(super) fn of(&self, state: State) -> u64 {
        match state {
            State::Shared => self.shared,
            State::Private => self.private,
        }
    }

    pub(super) fn of_mut(&mut self, state: State) -> &mut u64 {
        match state {
            State::Shared => &mut self.shared,
            State::Private => &mut self.private,
        }
    }

    pub(super) fn mixed(&self) -> u64 {
        self.private & self.shared
    }

    /// Sets a child's two bits from the child's own masks.
    pub(super) fn update(&mut self, child: usize, of_child: &Holds) {
        let bit = 1 << child;
        for state in [State::Shared, State::Private] {
            if of_child.of(state) == 0 {
                *self.of_mut(state) &= !bit;
            } else {
                *self.of_mut(state) |= bit;
            }
        }
    }
}

/// The page bits of a leaf. Not aligned to cache lines: that is not faster, and the gaps that allocators leave before
/// aligned allocations make it half as large again.
#[derive(Clone)]
pub(super) struct LeafBits(pub(super) [BlockBits; FANOUT]);

impl LeafBits {
    pub(super) fn new() -> Arc<LeafBits> {
        Arc::new(LeafBits(std::array::from_fn(|_| BlockBits::default())))
    }
}

/// The states of a block's pages: all the same, or one bit each.
pub(super) enum Block<'a> {
    Uniform(State),
    Mixed(&'a BlockBits),
}

#[derive(Clone, Default)]
pub(super) struct Leaf {
    /// Which of its blocks have private and shared pages.
    pub(super) holds: Holds,
    /// Present if and only if a block is mixed. The bits of its uniform blocks are not used and may have any value.
    pub(super) bits: Option<Arc<LeafBits>>,
}

impl Leaf {
    #[inline]
    pub(super) fn block(&self, block: usize) -> Block<'_> {
        match &self.bits {
            Some(bits) if self.holds.mixed() >> block & 1 != 0 => Block::Mixed(&bits.0[block]),
            _ => Block::Uniform(state_of(self.holds.private >> block)),
        }
    }
}

#[derive(Clone)]
pub(super) struct Branch {
    /// Which of its leaves have private and shared pages.
    pub(super) holds: Holds,
    pub(super) leaves: [Leaf; FANOUT],
}

/// A block's position in the tree.
#[derive(Clone, Copy)]
pub(super) struct Position {
    pub(super) branch: usize,
    pub(super) leaf: usize,
    pub(super) block: usize,
}

impl Position {
    pub(super) fn of(block: u64) -> Position {
        let block = block as usize;
        Position {
            branch: block / FANOUT / FANOUT,
            leaf: block / FANOUT % FANOUT,
            block: block % FANOUT,
        }
    }

    pub(super) fn number(self) -> u64 {
        ((self.branch * FANOUT + self.leaf) * FANOUT + self.block) as u64
    }
}
