//! Ranges of pages by themselves, and how they are printed.

use pagegate_core::memory::{address::*, page_map::*};
use proptest::prelude::*;

use crate::models::*;

#[test]
fn a_range_is_aligned_not_empty_and_does_not_wrap() {
    let top = u64::MAX - (PAGE_SIZE - 1);
    for (gpa, size) in [
        (0, 0),
        (PAGE_SIZE, 0),
        (1, PAGE_SIZE),
        (PAGE_SIZE / 2, PAGE_SIZE),
        (0, 1),
        (0, PAGE_SIZE + 1),
        (0, u64::MAX),
        (u64::MAX, 0),
        (u64::MAX, PAGE_SIZE),
        (u64::MAX, u64::MAX),
        // Ends at 2^64 exactly.
        (top, PAGE_SIZE),
        (PAGE_SIZE, top),
        (top, top),
    ] {
        assert_eq!(Range::new(gpa, size), None, "{gpa:#x} {size:#x}");
    }
    let last = Range::new(top - PAGE_SIZE, PAGE_SIZE).expect("ends below 2^64");
    assert_eq!((last.gpa(), last.end(), last.pages()), (top - PAGE_SIZE, top, 1));
    assert!(last.contains(top - 1) && !last.contains(top) && !last.contains(u64::MAX));
    assert_eq!(Range::new(0, top).map(|range| range.size()), Some(top));
}

#[test]
fn ranges_states_and_maps_are_printed_for_people() {
    assert_eq!(pages(1, 3).to_string(), "[0x1000, 0x3000)");
    assert_eq!(State::Private.to_string(), "private");
    assert_eq!(format!("{:>8}", State::Shared), "  shared");
    assert_eq!(State::Private.other(), State::Shared);
    assert_eq!(State::Shared.other().as_str(), "private");
    let debug = format!("{:?}", AttributeMap::new(TIB, State::Shared));
    assert_eq!(
        debug,
        "AttributeMap { size: 1099511627776, private_bytes: 0, generation: 0, .. }"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn ranges_relate_as_sets_of_pages_do(a in 0..40u64, b in 1..40u64, c in 0..40u64, d in 1..40u64) {
        let (x, y) = (pages(a, a + b), pages(c, c + d));
        let both: Vec<u64> = (0..100).filter(|page| {
            x.contains(page * PAGE_SIZE) && y.contains(page * PAGE_SIZE + PAGE_SIZE - 1)
        }).collect();
        prop_assert_eq!(x.pages(), b);
        prop_assert_eq!(x.overlaps(&y), !both.is_empty());
        let found = x.intersect(&y).map(span);
        prop_assert_eq!(found, both.first().zip(both.last()).map(|(first, last)| (*first, last + 1)));
    }
}
