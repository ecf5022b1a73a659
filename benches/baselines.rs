//! What else could keep the state of each page: the attribute map's baselines, behind one interface.

use std::hint::black_box;

use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::memory::page_map::AttributeMap;
use rangemap::RangeMap;
use roaring::RoaringBitmap;

use crate::pages::BLOCK;

/// Which pages are private. Pages are numbered from 0.
pub trait States: Sized {
    const NAME: &'static str;

    /// All shared.
    fn new(pages: u64) -> Self;

    fn set(&mut self, page: u64, private: bool);

    fn is_private(&self, page: u64) -> bool;

    /// Whether the 2 MiB block has pages of both states.
    fn is_mixed(&self, block: u64) -> bool;

    /// How many runs of private pages there are, each of which was looked at, as were those of shared pages where the
    /// structure has them.
    fn runs(&self) -> u64;

    /// Every other page of each 2 MiB block that `which` picks.
    fn fill(&mut self, pages: u64, which: impl Fn(u64) -> bool) {
        for block in (0..pages / BLOCK).filter(|block| which(*block)) {
            for page in (block * BLOCK..(block + 1) * BLOCK).step_by(2) {
                self.set(page, true);
            }
        }
    }
}

fn pages(first: u64, count: u64) -> Range {
    Range::new(first * PAGE_SIZE, count * PAGE_SIZE).expect("pages of the guest")
}

impl States for AttributeMap {
    const NAME: &'static str = "attributes";

    fn new(pages: u64) -> Self {
        AttributeMap::new(pages * PAGE_SIZE, State::Shared)
    }

    fn set(&mut self, page: u64, private: bool) {
        let to = if private { State::Private } else { State::Shared };
        AttributeMap::set(self, pages(page, 1), to);
    }

    fn is_private(&self, page: u64) -> bool {
        self.state(page * PAGE_SIZE) == State::Private
    }

    fn is_mixed(&self, block: u64) -> bool {
        self.uniform(pages(block * BLOCK, BLOCK)).is_none()
    }

    fn runs(&self) -> u64 {
        let private = AttributeMap::runs(self).filter(|run| run.state == State::Private);
        private.map(black_box).count() as u64
    }
}

impl States for RangeMap<u64, State> {
    const NAME: &'static str = "rangemap";

    fn new(pages: u64) -> Self {
        RangeMap::from([(0..pages, State::Shared)])
    }

    fn set(&mut self, page: u64, private: bool) {
        let to = if private { State::Private } else { State::Shared };
        self.insert(page..page + 1, to);
    }

    fn is_private(&self, page: u64) -> bool {
        self.get(&page) == Some(&State::Private)
    }

    fn is_mixed(&self, block: u64) -> bool {
        let (first, end) = (block * BLOCK, (block + 1) * BLOCK);
        let found = self.overlapping(first..end).next();
        found.is_some_and(|(run, _)| run.start > first || run.end < end)
    }

    fn runs(&self) -> u64 {
        let private = self.iter().filter(|(_, state)| **state == State::Private);
        private.map(black_box).count() as u64
    }
}

impl States for RoaringBitmap {
    const NAME: &'static str = "roaring";

    fn new(_: u64) -> Self {
        RoaringBitmap::new()
    }

    fn set(&mut self, page: u64, private: bool) {
        match private {
            true => self.insert(page as u32),
            false => self.remove(page as u32),
        };
    }

    fn is_private(&self, page: u64) -> bool {
        self.contains(page as u32)
    }

    fn is_mixed(&self, block: u64) -> bool {
        let (first, end) = ((block * BLOCK) as u32, ((block + 1) * BLOCK) as u32);
        !matches!(self.range_cardinality(first..end), 0 | BLOCK)
    }

    fn runs(&self) -> u64 {
        let mut pages = self.iter();
        std::iter::from_fn(|| pages.next_range()).map(black_box).count() as u64
    }
}
