//! Generations, stamps, block borders, memory use and snapshots of the map.

use pagegate_core::memory::{address::*, page_map::*};

use crate::models::*;

#[test]
fn only_changes_count_as_generations_and_only_changed_blocks_are_stamped() {
    let mut map = AttributeMap::new(4 * BLOCK * PAGE_SIZE, State::Shared);
    let blocks = |map: &AttributeMap, since| {
        let gpas = (0..4).map(|block| (block * BLOCK + 7) * PAGE_SIZE + 5);
        gpas.map(|gpa| map.changed_since(gpa, since)).collect::<Vec<_>>()
    };
    assert_eq!(map.set(pages(0, 4 * BLOCK), State::Shared), 0);
    assert_eq!(map.generation(), 0);
    assert_eq!(blocks(&map, 0), [false; 4]);

    assert_eq!(map.set(pages(BLOCK, BLOCK + 1), State::Private), PAGE_SIZE);
    assert_eq!(map.generation(), 1);
    assert_eq!(blocks(&map, 0), [false, true, false, false]);
    assert_eq!(blocks(&map, 1), [false; 4]);

    // A change of several blocks is one generation. One page of block 1 is private already and is not counted.
    assert_eq!(map.set(pages(BLOCK, 2 * BLOCK + 1), State::Private), BLOCK * PAGE_SIZE);
    assert_eq!(map.generation(), 2);
    assert_eq!(blocks(&map, 1), [false, true, true, false]);

    // A block that is all private already is not stamped by a change around it.
    assert_eq!(
        map.set(pages(0, 4 * BLOCK), State::Private),
        (3 * BLOCK - 1) * PAGE_SIZE
    );
    assert_eq!(blocks(&map, 2), [true, false, true, true]);

    // A page that is changed and changed back counts as changed.
    map.set(pages(3, 4), State::Shared);
    map.set(pages(3, 4), State::Private);
    assert_eq!(map.generation(), 5);
    assert_eq!(blocks(&map, 3), [true, false, false, false]);
    assert_eq!(map.uniform(pages(0, 4 * BLOCK)), Some(State::Private));
}

#[test]
fn the_last_block_is_mixed_until_its_last_page_changes() {
    for size in [2, 63, 64, 65, 130, BLOCK - 1, BLOCK, BLOCK + 3] {
        let mut map = AttributeMap::new(size * PAGE_SIZE, State::Shared);
        let first = (size - 1) / BLOCK * BLOCK;
        for to in [State::Private, State::Shared] {
            for page in first..size {
                assert_eq!(map.set(pages(page, page + 1), to), PAGE_SIZE);
                let mixed = map.uniform(pages(first, size)).is_none();
                assert_eq!(mixed, page + 1 < size, "page {page} of {size} to {to}");
            }
            assert_eq!(map.uniform(pages(first, size)), Some(to));
        }
    }
}

#[test]
fn all_of_a_tebibyte_can_be_set_at_once() {
    let mut map = AttributeMap::new(TIB, State::Shared);
    let all = Range::new(0, TIB).expect("a valid range");
    for (i, to) in (1..).zip([State::Private, State::Shared, State::Private]) {
        assert_eq!(map.set(all, to), TIB);
        assert_eq!(map.set(all, to), 0);
        assert_eq!(map.generation(), i);
        assert_eq!(map.uniform(all), Some(to));
        assert_eq!(map.runs().collect::<Vec<_>>(), [Run { range: all, state: to }]);
        assert_eq!(map.private_bytes(), if to == State::Private { TIB } else { 0 });
        assert!(map.changed_since(0, i - 1) && map.changed_since(TIB - 1, i - 1));
    }
    let hole = pages(TIB / PAGE_SIZE - 1, TIB / PAGE_SIZE);
    assert_eq!(map.set(hole, State::Shared), PAGE_SIZE);
    assert_eq!(map.uniform(all), None);
    assert_eq!(map.uniform(pages(0, TIB / PAGE_SIZE - 1)), Some(State::Private));
    assert_eq!(map.set(all, State::Private), PAGE_SIZE);
}

#[test]
fn memory_is_bounded_and_given_back() {
    let all = Range::new(0, TIB).expect("a valid range");
    let mut map = AttributeMap::new(TIB, State::Shared);
    let empty = map.memory();
    assert!(empty >= (TIB >> 21) as usize * 8, "the stamps alone: {empty}");

    // Whole blocks need no bits.
    for first in (0..TIB / PAGE_SIZE).step_by(2 * BLOCK as usize) {
        map.set(pages(first, first + BLOCK), State::Private);
    }
    assert_eq!(map.memory(), empty);
    assert_eq!(map.runs().count() as u64, TIB / PAGE_SIZE / BLOCK);

    // The worst case is a mixed block in each leaf: more mixed blocks take no more memory.
    for first in (0..TIB / PAGE_SIZE).step_by(LEAF as usize) {
        map.set(pages(first + 1, first + 2), State::Shared);
    }
    let worst = map.memory();
    assert!(worst >= empty + (32 << 20), "one bit for each page: {worst}");
    assert!(worst <= 37 << 20, "{worst}");
    for page in (0..2 * LEAF).step_by(2) {
        map.set(pages(page, page + 1), State::Private);
        map.set(pages(page + 1, page + 2), State::Shared);
    }
    assert_eq!(map.runs_in(pages(0, 2 * LEAF)).count() as u64, 2 * LEAF);
    assert_eq!(map.memory(), worst);

    // The map keeps the bits of one leaf for the next leaf that needs some.
    map.set(all, State::Shared);
    let spare = map.memory() - empty;
    assert!((4096..=8192).contains(&spare), "{spare}");
    for _ in 0..1000 {
        map.set(pages(5, 6), State::Private);
        map.set(pages(5, 6), State::Shared);
    }
    assert_eq!(map.memory() - empty, spare);
}

#[test]
fn a_snapshot_stays_as_it_was_in_other_threads_too() {
    fn shareable<T: Send + Sync + 'static>(value: T) -> T {
        value
    }
    let size = 2 * LEAF + 100;
    let mut map = shareable(AttributeMap::new(size * PAGE_SIZE, State::Shared));
    let mut readers = Vec::new();
    for round in 0..if cfg!(miri) { 3 } else { 50 } {
        let first = round * 1201;
        map.set(pages(first, first + 700), State::Private);
        let snapshot = shareable(map.snapshot());
        let expected: Vec<Run> = map.runs().collect();
        readers.push(std::thread::spawn(move || {
            for _ in 0..if cfg!(miri) { 2 } else { 20 } {
                assert!(snapshot.runs().eq(expected.iter().copied()));
            }
        }));
        for page in first..first + 64 {
            map.set(pages(page, page + 1), State::Shared);
        }
    }
    for reader in readers {
        assert!(reader.join().is_ok());
    }
}

#[test]
fn setting_the_runs_of_a_range_again_restores_it() {
    let mut map = AttributeMap::new(LEAF * PAGE_SIZE, State::Shared);
    map.set(pages(3, 70), State::Private);
    map.set(pages(500, 1030), State::Private);
    let before = map.snapshot();
    let range = pages(60, 1025);
    let previous: Vec<Run> = map.runs_in(range).collect();
    map.set(range, State::Shared);
    for run in previous {
        map.set(run.range, run.state);
    }
    assert!(map.runs().eq(before.runs()));
    assert_eq!(map.private_bytes(), before.private_bytes());
}
