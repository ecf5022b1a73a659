//! The states against a list of pages, what is known of changes, and the range locks against threads that want each
//! other's pages.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::sync::atomic::{AtomicBool, AtomicU32};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Pages of a block.
const BLOCK_PAGES: u64 = BLOCK / PAGE_SIZE;
/// Three whole blocks and a short one.
const PAGES: u64 = 3 * BLOCK_PAGES + 7;

fn pages(first: u64, count: u64) -> Range {
    Range::new(first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
}

fn page_states(initial: State) -> PageStates {
    PageStates::new(Views::new(PAGES * PAGE_SIZE, None, None), initial, 2)
}

/// Near a block's border as a rule, and of any length.
fn spans() -> impl Strategy<Value = (u64, u64)> {
    let near =
        (0..4u64, 0..6u64).prop_map(|(block, page)| (block * BLOCK_PAGES + page).saturating_sub(3).min(PAGES - 1));
    let first = prop_oneof![near, 0..PAGES];
    first.prop_flat_map(|first| {
        let most = PAGES - first;
        let count = prop_oneof![1..=most.min(6), 1..=most];
        (Just(first), count)
    })
}

fn states() -> impl Strategy<Value = State> {
    prop_oneof![Just(State::Shared), Just(State::Private)]
}

fn model_runs(model: &[State], first: u64, count: u64) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for page in first..first + count {
        let state = model[page as usize];
        match runs.last_mut() {
            Some(last) if last.state == state => {
                last.range = Range::new(last.range.gpa(), last.range.size() + PAGE_SIZE).unwrap();
            }
            _ => runs.push(Run {
                range: pages(page, 1),
                state,
            }),
        }
    }
    runs
}

proptest! {
    #[test]
    fn it_is_what_a_list_of_pages_is(
        initial in states(),
        changes in vec((spans(), states(), spans()), 1..24),
    ) {
        let shared = page_states(initial);
        let mut model = vec![initial; PAGES as usize];
        let mut generation = 0;
        let first = shared.lock().snapshot();
        for ((page, count), to, (asked, length)) in changes {
            let range = &mut model[page as usize..(page + count) as usize];
            let changed = range.iter().filter(|state| **state != to).count() as u64;
            range.fill(to);
            generation += u64::from(changed > 0);
            prop_assert_eq!(shared.set(&mut shared.lock(), pages(page, count), to), changed * PAGE_SIZE);
            prop_assert_eq!(shared.generation(), generation);
            let private = model.iter().filter(|state| **state == State::Private).count() as u64;
            let runs = model_runs(&model, asked, length);
            let uniform = (runs.len() == 1).then(|| runs[0].state);
            let states = shared.lock();
            let seen = states.see(pages(asked, length));
            prop_assert_eq!((seen.state, states.changes()), (uniform, generation));
            prop_assert!(seen.is_still_so(pages(asked, length), states.map()));
            prop_assert_eq!(states.map().private_bytes(), private * PAGE_SIZE);
            let private_asked = runs.iter().filter(|run| run.state == State::Private);
            let private_asked: u64 = private_asked.map(|run| run.range.size()).sum();
            prop_assert_eq!(states.private_in(pages(asked, length)), private_asked);
            let snapshot = states.snapshot();
            prop_assert_eq!(snapshot.runs_in(pages(asked, length)).collect::<Vec<_>>(), runs.clone());
            prop_assert_eq!(states.runs_in(pages(asked, length)), runs);
            prop_assert_eq!(snapshot.runs().collect::<Vec<_>>(), model_runs(&model, 0, PAGES));
            prop_assert_eq!(snapshot.state(asked * PAGE_SIZE), model[asked as usize]);
            prop_assert_eq!(snapshot.private_bytes(), private * PAGE_SIZE);
            prop_assert_eq!(snapshot.generation(), generation);
            prop_assert_eq!(snapshot.size(), PAGES * PAGE_SIZE);
        }
        prop_assert_eq!(first.runs().collect::<Vec<_>>(), model_runs(&vec![initial; PAGES as usize], 0, PAGES));
    }

    /// A change of a range since a generation is never missed. As long as it is remembered, no other range is taken for
    /// changed; after that, none in whose blocks nothing changed.
    #[test]
    fn what_changed_since_is_known(
        changes in vec((spans(), states(), any::<bool>(), spans()), 1..150),
    ) {
        let shared = page_states(State::Shared);
        let mut model = vec![State::Shared; PAGES as usize];
        let mut since = 0;
        let mut changed_since: Vec<(u64, u64)> = Vec::new();
        for ((page, count), to, enters, (asked, length)) in changes {
            let range = &mut model[page as usize..(page + count) as usize];
            if range.iter().any(|state| *state != to) {
                changed_since.push((page, count));
            }
            range.fill(to);
            shared.set(&mut shared.lock(), pages(page, count), to);
            if enters {
                since = shared.generation();
                changed_since.clear();
            }
            let touches = |unit: u64| {
                let (first, last) = (asked / unit, (asked + length - 1) / unit);
                changed_since.iter().any(|(page, count)| page / unit <= last && first <= (page + count - 1) / unit)
            };
            let said = shared.lock().changed_since(pages(asked, length), since);
            match changed_since.len() <= REMEMBERED {
                true => prop_assert_eq!(said, touches(1)),
                false => {
                    prop_assert!(said || !touches(1), "missed a change of {} pages at {}", length, asked);
                    prop_assert!(!said || touches(BLOCK_PAGES), "no block of {} pages at {} changed", length, asked);
                }
            }
        }
    }
}

#[test]
fn what_was_told_holds_until_a_page_is_in_another_state() {
    for first in [State::Shared, State::Private] {
        let shared = page_states(first);
        let mut states = shared.lock();
        let range = pages(BLOCK_PAGES - 2, 4);
        for mixed in [false, true] {
            if mixed {
                shared.set(&mut states, pages(BLOCK_PAGES - 1, 2), first.other());
            }
            let told = states.see(range);
            assert_eq!(told.state, (!mixed).then_some(first));
            for page in BLOCK_PAGES - 2..BLOCK_PAGES + 2 {
                let state = states.map().state(page * PAGE_SIZE);
                shared.set(&mut states, pages(page, 1), state.other());
                assert!(!told.is_still_so(range, states.map()));
                assert!(!told.is_still_so(pages(page, 1), states.map()));
                shared.set(&mut states, pages(page, 1), state);
                assert!(told.is_still_so(range, states.map()));
            }
        }
    }
}

#[test]
fn no_two_hold_a_page_and_none_waits_for_ever() {
    const THREADS: u64 = 4;
    const HOLDS: usize = if cfg!(miri) { 20 } else { 400 };
    let states = page_states(State::Shared);
    let owners: Vec<AtomicU32> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 1..=THREADS {
            let (states, owners, failed) = (&states, &owners, &failed);
            scope.spawn(move || {
                let mut random = thread;
                for _ in 0..HOLDS {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(thread);
                    let first = (random >> 33) % PAGES;
                    let count = 1 + (random >> 13) % (PAGES - first);
                    let _held = states.hold(pages(first, count));
                    // Some of the pages, for all of them would take longer than it proves.
                    let some = || (first..first + count).step_by(97).chain([first + count - 1]);
                    for page in some() {
                        owners[page as usize].store(thread as u32, Ordering::SeqCst);
                    }
                    std::thread::yield_now();
                    let mine = |page: u64| owners[page as usize].load(Ordering::SeqCst) == thread as u32;
                    if !some().all(mine) {
                        failed.store(true, Ordering::SeqCst);
                    }
                }
            });
        }
    });
    assert!(!failed.load(Ordering::SeqCst), "two held the same page");
}

#[test]
fn reserved_bytes_count_until_they_are_shared_or_given_back() {
    let shared = page_states(State::Private);
    let mut states = shared.lock();
    let max = 4 * PAGE_SIZE;
    assert!(states.reserve(3 * PAGE_SIZE, max));
    assert!(!states.reserve(2 * PAGE_SIZE, max));
    assert_eq!(
        shared.set(&mut states, pages(BLOCK_PAGES - 1, 2), State::Shared),
        2 * PAGE_SIZE
    );
    states.release(2 * PAGE_SIZE);
    assert!(!states.reserve(2 * PAGE_SIZE, max));
    states.release(PAGE_SIZE);
    assert!(states.reserve(2 * PAGE_SIZE, max));
}
