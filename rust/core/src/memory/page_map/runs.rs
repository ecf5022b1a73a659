//! The runs of a page map: adjacent pages in the same state, as many as possible.

use std::slice;
use std::sync::atomic::AtomicU64;

use crate::memory::address::{Range, Run, State};
use crate::memory::page_map::nodes::{BLOCK_PAGES, Block, get, mask, word_of};
use crate::memory::page_map::tree::Tree;

/// Yields the longest possible runs of some pages. Goes through mixed blocks by words of page bits, and from one to the
/// next by the tree's masks.
pub(super) struct Runs<'a> {
    tree: &'a Tree,
    /// State of the run that begins at `start`.
    state: State,
    /// The first page that was not yielded yet.
    start: u64,
    /// First page past the range.
    end: u64,
    /// The pages of the current word that differ from the page before them, each of which begins a run. Those that were
    /// yielded are cleared.
    edges: u64,
    /// First page of the current word.
    base: u64,
    /// The words that follow the current one in its block.
    words: slice::Iter<'a, AtomicU64>,
}

impl<'a> Runs<'a> {
    /// The runs of the pages `[first, end)`.
    #[inline]
    pub(super) fn new(tree: &'a Tree, first: u64, end: u64) -> Runs<'a> {
        let mut runs = Runs {
            tree,
            state: tree.state(first),
            start: first,
            end,
            edges: 0,
            base: first / 64 * 64,
            words: [].iter(),
        };
        if let Block::Mixed(bits) = tree.block(first / BLOCK_PAGES) {
            runs.words = bits.words_from(first % BLOCK_PAGES);
            let word = runs.words.next().map_or(0, get);
            // The run that begins at `first` is known: drop the edges up to there.
            runs.edges = (word ^ word << 1) & (!1 << (first % 64));
            runs.clip();
        }
        runs
    }

    /// Drops edges past the end.
    #[inline]
    fn clip(&mut self) {
        let left = self.end - self.base;
        if left < 64 {
            self.edges &= mask(0, left);
        }
    }

    /// Goes on to the next word with an edge. Leaves `edges` 0 if there is none before the end.
    #[inline]
    fn advance(&mut self) {
        loop {
            while let Some(word) = self.words.next() {
                self.base += 64;
                if self.base >= self.end {
                    return;
                }
                let word = get(word);
                self.edges = word ^ (word << 1 | word_of(self.state) & 1);
                if self.edges != 0 {
                    return self.clip();
                }
            }
            // The run goes on until the next block that holds a page of the other state.
            let Some(block) = self.tree.find(self.state.other(), self.base / BLOCK_PAGES + 1) else {
                return;
            };
            self.base = block * BLOCK_PAGES;
            if self.base >= self.end {
                return;
            }
            match self.tree.block(block) {
                Block::Uniform(_) => {
                    self.edges = 1;
                    return;
                }
                Block::Mixed(bits) => {
                    self.words = bits.words_from(0);
                    // The loop above adds 64 again. This is not the first block, so it cannot go below 0.
                    self.base -= 64;
                }
            }
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
                // The last run, which ends with the range, unless it was yielded already.
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
