//! Against a set of single pages.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;

use super::*;
use crate::memory::address::PAGE_SIZE;
use crate::memory::random::Random;

const PAGES: u64 = 24;
const STEPS: u64 = if cfg!(miri) { 100 } else { 20_000 };

fn pages(ranges: &[Range]) -> BTreeSet<u64> {
    let all = ranges.iter();
    all.flat_map(|range| range.gpa() / PAGE_SIZE..range.end() / PAGE_SIZE)
        .collect()
}

#[test]
fn it_has_what_a_set_of_pages_has() {
    let (mut set, mut model) = (RangeSet::default(), BTreeSet::new());
    let mut random = Random(0x9e37_79b9);
    let mut below = |bound| random.below(bound);
    for _ in 0..STEPS {
        let first = below(PAGES);
        let count = 1 + below((PAGES - first).min(6));
        let range = Range::new(first * PAGE_SIZE, count * PAGE_SIZE).unwrap();
        if below(2) == 0 {
            set.add(range);
            model.extend(first..first + count);
        } else {
            let taken: BTreeSet<u64> = (first..first + count).filter(|page| model.remove(page)).collect();
            assert_eq!(pages(&set.take(range)), taken);
        }
        assert_eq!(pages(set.ranges()), model);
        let apart = set.ranges().windows(2).all(|pair| pair[0].end() < pair[1].gpa());
        assert!(apart, "{set:?}");
    }
}
