//! Which pages of guest memory are private and which are shared.
//!
//! KVM can be told a page's attributes but not asked for them, so [`AttributeMap`] is the only copy of the truth.
//! It is exact for each 4 KiB page and answers questions about ranges without walking pages.
//!
//! # Structure
//!
//! A tree with a fan-out of 64 over blocks of 2 MiB:
//!
//! | level  | covers  | knows                                                                    |
//! |--------|---------|--------------------------------------------------------------------------|
//! | root   | 512 GiB | which branches hold private pages, and which hold shared ones            |
//! | branch | 8 GiB   | the same of its leaves                                                   |
//! | leaf   | 128 MiB | the same of its blocks; one bit for each page if at least one is mixed   |
//! | block  | 2 MiB   | nothing of its own: it is private, shared, or mixed by the leaf's two bits |
//!
//! A question climbs from a page only as far as its answer needs and comes down again, so its cost depends on the
//! depth, which is fixed, and hardly on the size of the guest. Bits of a block that is not mixed are stale and
//! never read: a change of whole blocks touches only the masks above them, and a leaf without a mixed block keeps
//! no bits at all.
//!
//! Worst case, with a mixed block in each leaf: 32.1 MiB of page bits for each TiB, 4 MiB of stamps, and 0.2 MiB
//! for the rest.
//!
//! Branches and bits are reference counted and copied when written while a [`Snapshot`] holds them too. Page bits
//! are atomics, so that the map can write them in place through a shared reference: finding out that nobody else
//! holds them takes two plain loads, where [`Arc::make_mut`] takes locked instructions, which would dominate the
//! cost of a change.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Size of a page, the unit of all bookkeeping, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Pages in a block (2 MiB).
const BLOCK_PAGES: u64 = 512;
/// Words of page bits in a block.
const BLOCK_WORDS: usize = 8;
/// Children of a leaf (blocks), of a branch (leaves), and of a root word (branches): one bit of a mask each.
const FANOUT: usize = 64;

/// Whether a page is private to the guest or shared with the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Ordinary host memory that both sides may touch.
    Shared,
    /// Memory of the guest alone, out of the host's reach.
    Private,
}

impl State {
    /// The state's name as it is written everywhere: `"shared"` or `"private"`.
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

    const fn from_bit(bit: u64) -> State {
        if bit & 1 == 0 { State::Shared } else { State::Private }
    }

    /// 64 pages of this state; a set bit is a private page.
    const fn word(self) -> u64 {
        match self {
            State::Shared => 0,
            State::Private => u64::MAX,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A range of guest-physical addresses, in bytes: page aligned at both ends, not empty, and ending below 2^64.
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

    /// First address, in bytes.
    pub const fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes, at least [`PAGE_SIZE`].
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// First address behind the range, in bytes.
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

    /// Whether the two have a page in common.
    pub const fn overlaps(&self, other: &Range) -> bool {
        self.gpa < other.end() && other.gpa < self.end()
    }

    /// The pages that both have, `None` if there are none.
    pub fn intersect(&self, other: &Range) -> Option<Range> {
        let gpa = self.gpa.max(other.gpa);
        let end = self.end().min(other.end());
        (gpa < end).then(|| Range { gpa, size: end - gpa })
    }

    /// The same pages, counted from `start`, a page that does not lie behind them.
    pub(crate) const fn below(&self, start: u64) -> Range {
        Range {
            gpa: self.gpa - start,
            size: self.size,
        }
    }

    /// The pages `[first, end)`, which lie in memory and are not empty.
    const fn of_pages(first: u64, end: u64) -> Range {
        Range {
            gpa: first * PAGE_SIZE,
            size: (end - first) * PAGE_SIZE,
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x})", self.gpa, self.end())
    }
}

/// Neighbouring pages of one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The pages.
    pub range: Range,
    /// The state that all of them are in.
    pub state: State,
}

/// Bits `[from, to)` of a word; `from < 64`, `1 <= to <= 64`.
const fn bits(from: u64, to: u64) -> u64 {
    (u64::MAX << from) & (u64::MAX >> (64 - to))
}

/// Which of a node's 64 children hold at least one private page, and which at least one shared page. A child with
/// both bits is mixed, one with neither lies behind the end of memory.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Holds {
    private: u64,
    shared: u64,
}

impl Holds {
    fn of(&self, state: State) -> u64 {
        match state {
            State::Shared => self.shared,
            State::Private => self.private,
        }
    }

    fn of_mut(&mut self, state: State) -> &mut u64 {
        match state {
            State::Shared => &mut self.shared,
            State::Private => &mut self.private,
        }
    }

    fn mixed(&self) -> u64 {
        self.private & self.shared
    }

    /// Takes over what a child knows of itself.
    fn update(&mut self, child: usize, of_child: &Holds) {
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

/// The pages of a block, one bit each, set for private. Bits behind the end of memory are clear.
type BlockBits = [AtomicU64; BLOCK_WORDS];

/// The pages of a leaf. Not aligned to cache lines: an allocator leaves gaps before aligned pieces, which come to
/// half as much memory again, and it is no faster.
struct Bits([BlockBits; FANOUT]);

impl Bits {
    fn new() -> Arc<Bits> {
        Arc::new(Bits(std::array::from_fn(|_| Default::default())))
    }
}

impl Clone for Bits {
    fn clone(&self) -> Bits {
        Bits(std::array::from_fn(|block| {
            std::array::from_fn(|word| AtomicU64::new(get(&self.0[block][word])))
        }))
    }
}

/// Reads page bits. Nobody writes them meanwhile: the map does so only behind `&mut`, a snapshot never.
fn get(word: &AtomicU64) -> u64 {
    word.load(Ordering::Relaxed)
}

#[derive(Clone, Default)]
struct Leaf {
    /// Of its blocks.
    holds: Holds,
    /// Present exactly if a block is mixed, and valid only for those that are.
    bits: Option<Arc<Bits>>,
}

impl Leaf {
    /// The bits of a block, given by its place in the leaf; `None` if it is not mixed.
    fn mixed(&self, block: usize) -> Option<&BlockBits> {
        match &self.bits {
            Some(bits) if self.holds.mixed() >> block & 1 != 0 => Some(&bits.0[block]),
            _ => None,
        }
    }

    /// The state of a block that is not mixed.
    fn uniform(&self, block: usize) -> State {
        State::from_bit(self.holds.private >> block)
    }
}

#[derive(Clone)]
struct Branch {
    /// Of its leaves.
    holds: Holds,
    leaves: [Leaf; FANOUT],
}

/// A block's place in the tree.
#[derive(Clone, Copy)]
struct Place {
    branch: usize,
    leaf: usize,
    block: usize,
}

impl Place {
    fn of(block: u64) -> Place {
        let block = block as usize;
        Place {
            branch: block / FANOUT / FANOUT,
            leaf: block / FANOUT % FANOUT,
            block: block % FANOUT,
        }
    }

    fn number(self) -> u64 {
        ((self.branch * FANOUT + self.leaf) * FANOUT + self.block) as u64
    }
}

/// What map and snapshot have in common. Pages and blocks are numbered from the start of memory.
#[derive(Clone)]
struct Tree {
    pages: u64,
    /// Of these, the pages of whole blocks.
    whole: u64,
    private_pages: u64,
    /// Of the branches.
    root: Vec<Holds>,
    branches: Vec<Arc<Branch>>,
    /// Held by all that were made of this: alone, it says that nobody else holds a branch or bits. After those, so that a
    /// snapshot lets go of it when it has let go of them.
    holders: Arc<()>,
    /// The bits that a leaf last gave up, so that a page which goes to and fro does not allocate each time. Never
    /// in common with others.
    spare: Option<Arc<Bits>>,
}

impl Tree {
    fn new(size: u64, initial: State) -> Tree {
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
                *leaf.holds.of_mut(initial) = bits(0, blocks);
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
        let private_pages = if initial == State::Private { pages } else { 0 };
        Tree {
            pages,
            whole: pages - pages % BLOCK_PAGES,
            private_pages,
            root,
            branches,
            holders: Arc::new(()),
            spare: None,
        }
    }

    fn size(&self) -> u64 {
        self.pages * PAGE_SIZE
    }

    /// The page that holds `gpa`.
    #[track_caller]
    #[inline]
    fn page(&self, gpa: u64) -> u64 {
        let page = gpa / PAGE_SIZE;
        assert!(
            page < self.pages,
            "gpa {gpa:#x} lies outside of memory, which ends at {:#x}",
            self.size()
        );
        page
    }

    /// The first page of `range` and the one behind it.
    #[track_caller]
    #[inline]
    fn span(&self, range: Range) -> (u64, u64) {
        assert!(
            range.end() <= self.size(),
            "range {range} lies outside of memory, which ends at {:#x}",
            self.size()
        );
        (range.gpa / PAGE_SIZE, range.end() / PAGE_SIZE)
    }

    fn leaf(&self, at: Place) -> &Leaf {
        &self.branches[at.branch].leaves[at.leaf]
    }

    /// How many pages a block has: all but the last one have [`BLOCK_PAGES`].
    fn block_pages(&self, block: u64) -> u64 {
        BLOCK_PAGES.min(self.pages - block * BLOCK_PAGES)
    }

    #[inline]
    fn state(&self, page: u64) -> State {
        let at = Place::of(page / BLOCK_PAGES);
        let leaf = self.leaf(at);
        match leaf.mixed(at.block) {
            Some(words) => State::from_bit(get(&words[(page % BLOCK_PAGES / 64) as usize]) >> (page % 64)),
            None => leaf.uniform(at.block),
        }
    }

    /// The state of all pages `[first, end)`, if they agree.
    fn uniform_of_several(&self, first: u64, end: u64) -> Option<State> {
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
        // In the block that has a page of the other state, that page may still lie behind `end`.
        let agree =
            end <= start || end - start < BLOCK_PAGES && self.uniform_in_block(found, 0, end - start) == Some(state);
        agree.then_some(state)
    }

    /// The state of all of a block's pages `[from, to)`, if they agree.
    #[inline]
    fn uniform_in_block(&self, block: u64, from: u64, to: u64) -> Option<State> {
        let at = Place::of(block);
        let leaf = self.leaf(at);
        let Some(words) = leaf.mixed(at.block) else {
            return Some(leaf.uniform(at.block));
        };
        let state = State::from_bit(get(&words[(from / 64) as usize]) >> (from % 64));
        (!any(words, state.other(), from, to)).then_some(state)
    }

    /// The first block, not before `from`, that holds a page in `state`. `from` may lie behind the end of memory.
    fn find(&self, state: State, from: u64) -> Option<u64> {
        let first = |mask: u64| mask.trailing_zeros() as usize;
        let mut at = Place::of(from);
        let branch = self.branches.get(at.branch)?;
        let blocks = branch.leaves[at.leaf].holds.of(state) & (u64::MAX << at.block);
        if blocks != 0 {
            at.block = first(blocks);
            return Some(at.number());
        }
        // `!1 << n` keeps the bits above n.
        let mut leaves = branch.holds.of(state) & (!1 << at.leaf);
        if leaves == 0 {
            let mut word = at.branch / FANOUT;
            let mut branches = self.root[word].of(state) & (!1 << (at.branch % FANOUT));
            while branches == 0 {
                word += 1;
                branches = self.root.get(word)?.of(state);
            }
            at.branch = word * FANOUT + first(branches);
            leaves = self.branches[at.branch].holds.of(state);
        }
        at.leaf = first(leaves);
        at.block = first(self.leaf(at).holds.of(state));
        Some(at.number())
    }

    /// As [`find`](Self::find), with the block's bits if it is mixed.
    fn find_words(&self, state: State, from: u64) -> Option<(u64, Option<&BlockBits>)> {
        let block = self.find(state, from)?;
        let at = Place::of(block);
        Some((block, self.leaf(at).mixed(at.block)))
    }

    /// Puts the blocks `[first, end)`, which lie in one leaf, into state `to`. Returns how many pages changed, and
    /// which of the leaf's blocks hold one that did.
    fn set_blocks(&mut self, first: u64, end: u64, to: State) -> (u64, u64) {
        let at = Place::of(first);
        let range = bits(at.block as u64, at.block as u64 + end - first);
        let leaf = self.leaf(at);
        let changing = leaf.holds.of(to.other()) & range;
        if changing == 0 {
            return (0, 0);
        }
        let mut pages = u64::from(changing.count_ones()) * BLOCK_PAGES;
        if changing >> (at.block as u64 + end - first - 1) & 1 != 0 {
            pages -= BLOCK_PAGES - self.block_pages(end - 1);
        }
        let mut mixed = changing & leaf.holds.mixed();
        while mixed != 0 {
            let block = mixed.trailing_zeros() as usize;
            mixed &= mixed - 1;
            let words = leaf.mixed(block).expect("the mask says so");
            let private: u64 = words.iter().map(|word| u64::from(get(word).count_ones())).sum();
            pages -= match to {
                State::Private => private,
                State::Shared => self.block_pages(first - at.block as u64 + block as u64) - private,
            };
        }
        self.edit(at, |leaf, _| {
            *leaf.holds.of_mut(to) |= range;
            *leaf.holds.of_mut(to.other()) &= !range;
        });
        (pages, changing)
    }

    /// Puts a page into state `to`, if its block is mixed, stays so, and has bits that nobody else holds: whether that
    /// changed it.
    #[inline(always)]
    fn flip(&mut self, page: u64, to: State) -> Option<bool> {
        if page >= self.whole {
            return None;
        }
        let at = Place::of(page / BLOCK_PAGES);
        let words = self.leaf(at).mixed(at.block)?;
        if !self.has_no_snapshot() {
            return None;
        }
        let word = &words[(page % BLOCK_PAGES / 64) as usize];
        let (old, bit) = (get(word), 1 << (page % 64));
        if (old ^ to.word()) & bit == 0 {
            return Some(false);
        }
        let new = old ^ bit;
        // One that is all in one state may be the last such of its block.
        if new == to.word() {
            return None;
        }
        word.store(new, Ordering::Relaxed);
        match to {
            State::Private => self.private_pages += 1,
            State::Shared => self.private_pages -= 1,
        }
        Some(true)
    }

    /// Puts a block's pages `[from, end)`, which are not all of its pages, into state `to`. Returns how many pages
    /// changed.
    #[inline(always)]
    fn set_pages(&mut self, block: u64, from: u64, end: u64, to: State) -> u64 {
        let at = Place::of(block);
        let pages = self.block_pages(block);
        let leaf = self.leaf(at);
        let Some(mut words) = leaf.mixed(at.block) else {
            return if leaf.uniform(at.block) == to {
                0
            } else {
                self.mix(at, from, end, to)
            };
        };
        if !self.exclusive(at) {
            if !any(words, to.other(), from, end) {
                return 0;
            }
            words = self.unshare(at);
        }
        let changed = write(words, from, end, to);
        // Bits behind the end of memory are clear, so a shorter block needs a closer look.
        if words.iter().all(|word| get(word) == to.word()) || pages < BLOCK_PAGES && !any(words, to.other(), 0, pages) {
            self.unmix(at, to);
        }
        changed
    }

    /// Puts pages `[from, end)` of a block that is all of the other state into state `to`.
    #[inline(never)]
    fn mix(&mut self, at: Place, from: u64, end: u64, to: State) -> u64 {
        let words = self.filled(at.number(), to.other());
        let changed = write(&words, from, end, to);
        self.edit(at, |leaf, spare| {
            // What a spare one holds is as stale as any bits of blocks that are not mixed.
            let bits = leaf.bits.get_or_insert_with(|| spare.take().unwrap_or_else(Bits::new));
            Arc::make_mut(bits).0[at.block] = words;
            *leaf.holds.of_mut(to) |= 1 << at.block;
        });
        changed
    }

    /// Notes that a mixed block has become all `state`.
    #[inline(never)]
    fn unmix(&mut self, at: Place, state: State) {
        self.edit(at, |leaf, _| *leaf.holds.of_mut(state.other()) &= !(1 << at.block));
    }

    /// Whether there is no snapshot, so that none holds anything of this.
    #[inline(always)]
    fn has_no_snapshot(&self) -> bool {
        let alone = Arc::strong_count(&self.holders) == 1;
        // As in `exclusive`.
        fence(Ordering::Acquire);
        alone
    }

    /// Whether no snapshot holds the bits of a leaf.
    fn exclusive(&self, at: Place) -> bool {
        let branch = &self.branches[at.branch];
        // Others can hold the bits themselves, or a branch that holds them.
        let exclusive = Arc::strong_count(branch) == 1
            && branch.leaves[at.leaf]
                .bits
                .as_ref()
                .is_none_or(|bits| Arc::strong_count(bits) == 1);
        // What a snapshot read before it was dropped comes before what is written now.
        fence(Ordering::Acquire);
        exclusive
    }

    /// The bits of a mixed block, no longer in common with a snapshot.
    #[inline(never)]
    fn unshare(&mut self, at: Place) -> &BlockBits {
        let leaf = &mut Arc::make_mut(&mut self.branches[at.branch]).leaves[at.leaf];
        &Arc::make_mut(leaf.bits.as_mut().expect("a block is mixed")).0[at.block]
    }

    /// Changes a leaf, which may take the spare bits, and tells the levels above.
    fn edit(&mut self, at: Place, change: impl FnOnce(&mut Leaf, &mut Option<Arc<Bits>>)) {
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

    /// A copy of a block's bits, mixed or not.
    fn block_bits(&self, block: u64) -> BlockBits {
        let at = Place::of(block);
        let leaf = self.leaf(at);
        match leaf.mixed(at.block) {
            Some(words) => std::array::from_fn(|i| AtomicU64::new(get(&words[i]))),
            None => self.filled(block, leaf.uniform(at.block)),
        }
    }

    /// The bits of a block whose pages are all in `state`.
    fn filled(&self, block: u64, state: State) -> BlockBits {
        let words = BlockBits::default();
        write(&words, 0, self.block_pages(block), state);
        words
    }
}

/// Cuts a block's pages `[from, to)` into the words that hold them, each with the mask of the bits meant.
#[inline]
fn pieces(words: &BlockBits, from: u64, to: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
    let (first, last) = (from / 64, (to - 1) / 64);
    (first..last + 1).map(move |word| {
        let from = if word == first { from % 64 } else { 0 };
        let to = if word == last { (to - 1) % 64 + 1 } else { 64 };
        (&words[word as usize], bits(from, to))
    })
}

/// Whether one of a block's pages `[from, to)` is in `state`.
#[inline]
fn any(words: &BlockBits, state: State, from: u64, to: u64) -> bool {
    let flip = state.other().word();
    pieces(words, from, to).any(|(word, mask)| (get(word) ^ flip) & mask != 0)
}

/// Puts a block's pages `[from, to)` into `state`. Returns how many were in the other one. Nobody else may hold
/// the words.
#[inline]
fn write(words: &BlockBits, from: u64, to: u64, state: State) -> u64 {
    let mut changed = 0;
    for (word, mask) in pieces(words, from, to) {
        let change = (get(word) ^ state.word()) & mask;
        word.store(get(word) ^ change, Ordering::Relaxed);
        changed += u64::from(change.count_ones());
    }
    changed
}

/// Enumerates maximal runs, a word of page bits at a time.
struct Runs<'a> {
    tree: &'a Tree,
    /// State of the run that begins at `start`.
    state: State,
    /// Page.
    start: u64,
    /// First page behind the range.
    end: u64,
    /// Of the current word, the pages that differ from the page before and were not reported yet: each is where a
    /// run begins.
    edges: u64,
    /// First page of the current word.
    base: u64,
    /// What follows the current word in its block.
    words: std::slice::Iter<'a, AtomicU64>,
}

impl<'a> Runs<'a> {
    #[inline]
    fn new(tree: &'a Tree, first: u64, end: u64) -> Runs<'a> {
        let at = Place::of(first / BLOCK_PAGES);
        let mut runs = Runs {
            tree,
            state: tree.state(first),
            start: first,
            end,
            edges: 0,
            base: first / 64 * 64,
            words: [].iter(),
        };
        if let Some(words) = tree.leaf(at).mixed(at.block) {
            runs.words = words[(first % BLOCK_PAGES / 64) as usize..].iter();
            let word = runs.words.next().map_or(0, get);
            // A run that begins at `first` or before is not news.
            runs.edges = (word ^ word << 1) & (!1 << (first % 64));
            runs.clip();
        }
        runs
    }

    /// Drops edges behind the end.
    #[inline(always)]
    fn clip(&mut self) {
        let left = self.end - self.base;
        if left < 64 {
            self.edges &= bits(0, left);
        }
    }

    /// Goes on to the next word with an edge; leaves `edges` 0 if the range has none. Inlined, as a call would
    /// keep the whole iterator out of registers.
    #[inline(always)]
    fn advance(&mut self) {
        loop {
            while let Some(word) = self.words.next() {
                self.base += 64;
                if self.base >= self.end {
                    return;
                }
                let word = get(word);
                self.edges = word ^ (word << 1 | self.state.word() & 1);
                if self.edges != 0 {
                    return self.clip();
                }
            }
            // Up to the next block with a page of the other state all is one run.
            let Some((block, words)) = self.tree.find_words(self.state.other(), self.base / BLOCK_PAGES + 1) else {
                return;
            };
            self.base = block * BLOCK_PAGES;
            if self.base >= self.end {
                return;
            }
            let Some(words) = words else {
                self.edges = 1;
                return;
            };
            self.words = words.iter();
            // The loop above steps to the block's first word. This is not the first block.
            self.base -= 64;
        }
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    #[inline]
    fn next(&mut self) -> Option<Run> {
        if self.edges == 0 {
            if self.start < self.end {
                self.advance();
            }
            if self.edges == 0 {
                let start = std::mem::replace(&mut self.start, self.end);
                return (start < self.end).then(|| Run {
                    range: Range::of_pages(start, self.end),
                    state: self.state,
                });
            }
        }
        let end = self.base + u64::from(self.edges.trailing_zeros());
        self.edges &= self.edges - 1;
        let run = Run {
            range: Range::of_pages(self.start, end),
            state: self.state,
        };
        self.start = end;
        self.state = self.state.other();
        Some(run)
    }
}

/// The pages that differ between two trees of one size, in pieces that need not be maximal.
struct Pieces<'a> {
    old: &'a Tree,
    new: &'a Tree,
    /// The next leaf to compare, counted from the start of memory.
    leaf: usize,
    /// Of the leaf before it, the blocks that may differ and were not compared yet.
    blocks: u64,
    /// Of the current block, the words that follow the current one: old, new, and their number.
    words: std::iter::Enumerate<std::array::IntoIter<(u64, u64), BLOCK_WORDS>>,
    /// Of the current word, the pages that differ and were not reported yet, and all pages' new states.
    differ: u64,
    now: u64,
    /// First page of the current word, and of the current block.
    base: u64,
    block: u64,
}

impl Pieces<'_> {
    /// The next leaf with blocks that may differ.
    fn next_leaf(&mut self) -> Option<u64> {
        loop {
            let (branch, leaf) = (self.leaf / FANOUT, self.leaf % FANOUT);
            let old = self.old.branches.get(branch)?;
            let new = &self.new.branches[branch];
            if Arc::ptr_eq(old, new) {
                self.leaf = (branch + 1) * FANOUT;
                continue;
            }
            self.leaf += 1;
            let (old, new) = (&old.leaves[leaf], &new.leaves[leaf]);
            let mut blocks = (old.holds.private ^ new.holds.private) | (old.holds.shared ^ new.holds.shared);
            if let (Some(a), Some(b)) = (&old.bits, &new.bits)
                && !Arc::ptr_eq(a, b)
            {
                blocks |= old.holds.mixed() & new.holds.mixed();
            }
            if blocks != 0 {
                return Some(blocks);
            }
        }
    }
}

impl Iterator for Pieces<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        while self.differ == 0 {
            if let Some((i, (old, now))) = self.words.next() {
                self.base = self.block + i as u64 * 64;
                self.differ = old ^ now;
                self.now = now;
                continue;
            }
            if self.blocks == 0 {
                self.blocks = self.next_leaf()?;
            }
            let block = ((self.leaf - 1) * FANOUT) as u64 + u64::from(self.blocks.trailing_zeros());
            self.blocks &= self.blocks - 1;
            self.block = block * BLOCK_PAGES;
            let (old, new) = (self.old.block_bits(block), self.new.block_bits(block));
            self.words = std::array::from_fn(|i| (get(&old[i]), get(&new[i])))
                .into_iter()
                .enumerate();
        }
        let from = self.differ.trailing_zeros();
        let state = State::from_bit(self.now >> from);
        let same = self.differ & (self.now ^ state.other().word());
        let pages = (same >> from).trailing_ones();
        self.differ &= !bits(u64::from(from), u64::from(from + pages));
        let first = self.base + u64::from(from);
        Some(Run {
            range: Range::of_pages(first, first + u64::from(pages)),
            state,
        })
    }
}

/// The exact state of each page of a guest's memory, which starts at guest-physical address 0.
///
/// Takes at most about 37 MiB for each TiB of guest memory, whatever is private, and however often it changed.
///
/// ```
/// use pagegate_core::attributes::{AttributeMap, Range, State};
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
    /// For each block the generation that last changed one of its pages. The memory is fresh from the system and
    /// costs nothing until written.
    stamps: Vec<u64>,
}

/// What an [`AttributeMap`] was at some time.
///
/// Taking and cloning one costs about a pointer for each 8 GiB of guest memory. While it lives, the map copies
/// what it changes: at most 4 KiB for each 128 MiB of guest memory, once.
#[derive(Clone)]
pub struct Snapshot {
    tree: Tree,
    generation: u64,
}

macro_rules! queries {
    () => {
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
        /// If `range` ends behind [`size`](Self::size).
        #[track_caller]
        #[inline(always)]
        pub fn uniform(&self, range: Range) -> Option<State> {
            let (first, end) = self.tree.span(range);
            match range.size {
                PAGE_SIZE => Some(self.tree.state(first)),
                _ => self.tree.uniform_of_several(first, end),
            }
        }

        /// How many bytes are private: a multiple of [`PAGE_SIZE`]. The rest of memory is shared.
        pub fn private_bytes(&self) -> u64 {
            self.tree.private_pages * PAGE_SIZE
        }

        /// How many calls of [`AttributeMap::set`] had changed something, and how many there were of
        /// [`AttributeMap::disturb`]; 0 for a new map.
        pub fn generation(&self) -> u64 {
            self.generation
        }

        /// All memory in ascending order, as the fewest possible runs: neighbours differ in state.
        #[inline]
        pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
            Runs::new(&self.tree, 0, self.tree.pages)
        }

        /// As [`runs`](Self::runs), of `range` only; the first and the last run are cut to it.
        ///
        /// # Panics
        ///
        /// If `range` ends behind [`size`](Self::size).
        #[track_caller]
        #[inline]
        pub fn runs_in(&self, range: Range) -> impl Iterator<Item = Run> + '_ {
            let (first, end) = self.tree.span(range);
            Runs::new(&self.tree, first, end)
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
        let stamps = vec![0; tree.pages.div_ceil(BLOCK_PAGES) as usize];
        AttributeMap {
            tree,
            generation: 0,
            stamps,
        }
    }

    queries!();

    /// Whether the 2 MiB block that holds the byte at `gpa` has pages of both states. The last block may be
    /// shorter.
    ///
    /// # Panics
    ///
    /// If `gpa` is not below [`size`](Self::size).
    #[track_caller]
    pub fn block_mixed(&self, gpa: u64) -> bool {
        let at = Place::of(self.tree.page(gpa) / BLOCK_PAGES);
        self.tree.leaf(at).mixed(at.block).is_some()
    }

    /// Puts all pages of `range` into state `to`. Returns how many bytes were in the other state before, 0 to
    /// `range.size()`.
    ///
    /// If that is not 0, the [`generation`](Self::generation) goes up by 1, and the blocks of the pages that
    /// changed are stamped with it.
    ///
    /// # Panics
    ///
    /// If `range` ends behind [`size`](Self::size). Nothing has changed then.
    #[track_caller]
    #[inline(always)]
    pub fn set(&mut self, range: Range, to: State) -> u64 {
        // By far the most frequent change: one page among others of both states.
        if range.size == PAGE_SIZE
            && let Some(changed) = self.tree.flip(range.gpa / PAGE_SIZE, to)
        {
            if !changed {
                return 0;
            }
            self.generation += 1;
            self.stamps[(range.gpa / PAGE_SIZE / BLOCK_PAGES) as usize] = self.generation;
            return PAGE_SIZE;
        }
        self.set_several(range, to)
    }

    /// Takes note of a change of a range that was undone again: whoever saw its pages meanwhile may have seen either state.
    ///
    /// # Panics
    ///
    /// If the range is not in memory.
    #[track_caller]
    pub fn disturb(&mut self, range: Range) {
        let (first, end) = self.tree.span(range);
        self.generation += 1;
        for block in first / BLOCK_PAGES..end.div_ceil(BLOCK_PAGES) {
            self.stamps[block as usize] = self.generation;
        }
    }

    #[track_caller]
    fn set_several(&mut self, range: Range, to: State) -> u64 {
        let (mut page, end) = self.tree.span(range);
        let stamp = self.generation + 1;
        let mut changed = 0;
        while page < end {
            let block = page / BLOCK_PAGES;
            let behind = if end == self.tree.pages {
                self.stamps.len() as u64
            } else {
                end / BLOCK_PAGES
            };
            if page.is_multiple_of(BLOCK_PAGES) && block < behind {
                // Whole blocks, to the end of their leaf at most.
                let behind = behind.min((block / FANOUT as u64 + 1) * FANOUT as u64);
                let (pages, mut blocks) = self.tree.set_blocks(block, behind, to);
                changed += pages;
                let leaf = block as usize / FANOUT * FANOUT;
                while blocks != 0 {
                    self.stamps[leaf + blocks.trailing_zeros() as usize] = stamp;
                    blocks &= blocks - 1;
                }
                page = end.min(behind * BLOCK_PAGES);
            } else {
                let start = block * BLOCK_PAGES;
                let stop = end.min(start + BLOCK_PAGES);
                let pages = self.tree.set_pages(block, page - start, stop - start, to);
                if pages > 0 {
                    changed += pages;
                    self.stamps[block as usize] = stamp;
                }
                page = stop;
            }
        }
        if changed > 0 {
            self.generation = stamp;
            match to {
                State::Private => self.tree.private_pages += changed,
                State::Shared => self.tree.private_pages -= changed,
            }
        }
        changed * PAGE_SIZE
    }

    /// Whether a page of the 2 MiB block that holds the byte at `gpa` was changed after `generation`, also if it
    /// was changed back since.
    ///
    /// # Panics
    ///
    /// If `gpa` is not below [`size`](Self::size).
    #[track_caller]
    pub fn changed_since(&self, gpa: u64, generation: u64) -> bool {
        self.stamps[(self.tree.page(gpa) / BLOCK_PAGES) as usize] > generation
    }

    /// The map as it is now. Later changes of the map do not show in it.
    pub fn snapshot(&self) -> Snapshot {
        let tree = Tree {
            spare: None,
            ..self.tree.clone()
        };
        Snapshot {
            tree,
            generation: self.generation,
        }
    }

    /// Heap memory that this map holds, in bytes. Counts what it has in common with snapshots, but not what only
    /// they hold.
    pub fn memory(&self) -> usize {
        /// What reference counting puts before a value of type `T`.
        fn counted<T>() -> usize {
            size_of::<T>() + (2 * size_of::<usize>()).max(align_of::<T>())
        }
        let tree = &self.tree;
        let leaves = tree.branches.iter().flat_map(|branch| &branch.leaves);
        self.stamps.capacity() * size_of::<u64>()
            + tree.root.capacity() * size_of::<Holds>()
            + tree.branches.capacity() * size_of::<Arc<Branch>>()
            + tree.branches.len() * counted::<Branch>()
            + leaves.filter_map(|leaf| leaf.bits.as_ref()).chain(&tree.spare).count() * counted::<Bits>()
    }
}

impl Snapshot {
    queries!();

    /// Where `newer` differs from this snapshot, with the state in `newer`, in ascending order and as the fewest
    /// possible runs.
    ///
    /// What the two have in common because nothing was written to it in between is skipped without a look at its
    /// pages. The order of time does not matter: snapshots the other way round yield the same ranges with the
    /// opposite states.
    ///
    /// # Panics
    ///
    /// If the two are of different sizes.
    #[track_caller]
    pub fn diff<'a>(&'a self, newer: &'a Snapshot) -> impl Iterator<Item = Run> + 'a {
        let (old, new) = (&self.tree, &newer.tree);
        assert!(
            old.pages == new.pages,
            "snapshots of {:#x} and {:#x} bytes cannot be compared",
            old.size(),
            new.size()
        );
        let words = [(0, 0); BLOCK_WORDS].into_iter().enumerate();
        let mut pieces = Pieces {
            old,
            new,
            leaf: 0,
            blocks: 0,
            words,
            differ: 0,
            now: 0,
            base: 0,
            block: 0,
        }
        .peekable();
        std::iter::from_fn(move || {
            let mut run = pieces.next()?;
            while let Some(next) = pieces.next_if(|next| next.state == run.state && next.range.gpa == run.range.end()) {
                run.range.size += next.range.size;
            }
            Some(run)
        })
    }
}

fn summary(f: &mut fmt::Formatter<'_>, name: &str, tree: &Tree, generation: u64) -> fmt::Result {
    f.debug_struct(name)
        .field("size", &tree.size())
        .field("private_bytes", &(tree.private_pages * PAGE_SIZE))
        .field("generation", &generation)
        .finish_non_exhaustive()
}

impl fmt::Debug for AttributeMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        summary(f, "AttributeMap", &self.tree, self.generation)
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        summary(f, "Snapshot", &self.tree, self.generation)
    }
}
