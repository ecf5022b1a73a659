//! A set of pages: a bit for each.

use crate::allocation::reserve;
use crate::errno::Errno;
use crate::memory::address::{PAGE_SIZE, Range};

const BITS: u64 = 64;

/// A set of pages of memory that ends at a fixed address.
pub(crate) struct PageBits {
    words: Vec<u64>,
    count: u64,
}

impl PageBits {
    /// None of the pages below `end`.
    ///
    /// # Errors
    /// ENOMEM.
    pub(crate) fn new(end: u64) -> Result<Self, Errno> {
        let size = (end / PAGE_SIZE).div_ceil(BITS) as usize;
        let mut words = Vec::new();
        reserve(&mut words, size)?;
        words.resize(size, 0);
        Ok(Self { words, count: 0 })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How many pages.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    pub(crate) fn contains(&self, gpa: u64) -> bool {
        let page = gpa / PAGE_SIZE;
        self.words
            .get((page / BITS) as usize)
            .is_some_and(|word| word >> (page % BITS) & 1 == 1)
    }

    pub(crate) fn insert(&mut self, range: Range) {
        self.each_word(range, |word, mask| {
            let added = (mask & !*word).count_ones();
            *word |= mask;
            i64::from(added)
        });
    }

    pub(crate) fn remove(&mut self, range: Range) {
        self.each_word(range, |word, mask| {
            let removed = (mask & *word).count_ones();
            *word &= !mask;
            -i64::from(removed)
        });
    }

    /// The first of them in the range: its gpa.
    pub(crate) fn first_in(&self, range: Range) -> Option<u64> {
        let (first, end) = (range.gpa() / PAGE_SIZE, range.end() / PAGE_SIZE);
        let mut page = first;
        while page < end {
            let word = self.words.get((page / BITS) as usize)? >> (page % BITS);
            if word != 0 {
                page += u64::from(word.trailing_zeros());
                return (page < end).then_some(page * PAGE_SIZE);
            }
            page = (page / BITS + 1) * BITS;
        }
        None
    }

    /// Those that follow each other without a gap, within `bounds`, around one of them.
    pub(crate) fn run_around(&self, gpa: u64, bounds: Range) -> Option<Range> {
        if !self.contains(gpa) {
            return None;
        }
        let (first, last) = (bounds.gpa() / PAGE_SIZE, bounds.end() / PAGE_SIZE);
        // A word at a time, of which a bit that is set ends the run.
        let gaps = |page: u64| self.words.get((page / BITS) as usize).map_or(u64::MAX, |word| !word);
        let (mut start, mut end) = (gpa / PAGE_SIZE, gpa / PAGE_SIZE + 1);
        while end < last {
            let above = gaps(end) >> (end % BITS);
            if above != 0 {
                end += u64::from(above.trailing_zeros());
                break;
            }
            end = (end / BITS + 1) * BITS;
        }
        while start > first {
            let below = gaps(start - 1) << (BITS - 1 - (start - 1) % BITS);
            if below != 0 {
                start -= u64::from(below.leading_zeros());
                break;
            }
            start = (start - 1) / BITS * BITS;
        }
        let (start, end) = (start.max(first), end.min(last));
        Range::new(start * PAGE_SIZE, (end - start) * PAGE_SIZE)
    }

    /// Calls `change` for each word of the range with the bits that are in it, which says by how many the set grew.
    fn each_word(&mut self, range: Range, change: impl Fn(&mut u64, u64) -> i64) {
        let (mut page, end) = (range.gpa() / PAGE_SIZE, range.end() / PAGE_SIZE);
        while page < end {
            let stop = ((page / BITS + 1) * BITS).min(end);
            let mask = (u64::MAX >> (BITS - (stop - page))) << (page % BITS);
            if let Some(word) = self.words.get_mut((page / BITS) as usize) {
                self.count = self.count.saturating_add_signed(change(word, mask));
            }
            page = stop;
        }
    }
}

#[cfg(test)]
mod tests;
