//! Against a set of single pages.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;

use super::*;
use crate::memory::random::Random;

const PAGES: u64 = 200;
const STEPS: u64 = if cfg!(miri) { 100 } else { 20_000 };

#[test]
fn it_has_what_a_set_of_pages_has() {
    let (mut bits, mut model) = (PageBits::new(PAGES * PAGE_SIZE).unwrap(), BTreeSet::new());
    let mut random = Random(0x9e37_79b9);
    let mut range = || {
        let first = random.below(PAGES);
        // Short ones and long ones, in which there are long runs.
        let most = if random.below(4) == 0 {
            PAGES - first
        } else {
            (PAGES - first).min(9)
        };
        (first, first + 1 + random.below(most))
    };
    let of = |(first, end): (u64, u64)| Range::of_pages(first, end);
    for step in 0..STEPS {
        let changed = range();
        if step % 3 == 0 {
            bits.remove(of(changed));
            model.retain(|page| !(changed.0..changed.1).contains(page));
        } else {
            bits.insert(of(changed));
            model.extend(changed.0..changed.1);
        }
        let within = range();
        assert_eq!((bits.count(), bits.is_empty()), (model.len() as u64, model.is_empty()));
        let first = model.range(within.0..within.1).next();
        assert_eq!(bits.first_in(of(within)), first.map(|page| page * PAGE_SIZE));
        for page in [within.0, within.1 - 1] {
            let run = model.contains(&page).then(|| {
                let start = (within.0..page).rev().take_while(|below| model.contains(below)).last();
                let end = (page..within.1).take_while(|above| model.contains(above)).last();
                (start.unwrap_or(page), end.unwrap_or(page) + 1)
            });
            assert_eq!(
                bits.run_around(page * PAGE_SIZE, of(within)),
                run.map(of),
                "{page} in {within:?}"
            );
        }
    }
}
