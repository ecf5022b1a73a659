//! The ledger against a list of pages, across its parts' borders, and its locks against threads that want each other's.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::sync::atomic::{AtomicBool, AtomicU32};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::attributes::PAGE_SIZE;

const PART: u64 = SMALLEST / PAGE_SIZE;
/// Three whole parts and a short one.
const PAGES: u64 = 3 * PART + 7;

fn pages(first: u64, count: u64) -> Range {
    Range::new(first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
}

fn ledger(initial: State) -> Ledger {
    let ledger = Ledger::new(PAGES * PAGE_SIZE, initial, 2);
    assert_eq!(ledger.parts.len(), 4);
    ledger
}

/// Near a border as a rule, and of any length.
fn spans() -> impl Strategy<Value = (u64, u64)> {
    let near = (0..4u64, 0..6u64).prop_map(|(part, page)| (part * PART + page).saturating_sub(3).min(PAGES - 1));
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
        let (range, state) = (pages(page, 1), model[page as usize]);
        append(&mut runs, std::iter::once(Run { range, state }));
    }
    runs
}

proptest! {
    #[test]
    fn it_is_what_a_list_of_pages_is(
        initial in states(),
        changes in vec((spans(), states(), spans()), 1..24),
    ) {
        let ledger = ledger(initial);
        let mut model = vec![initial; PAGES as usize];
        let mut generation = 0;
        let first = ledger.snapshot();
        for ((page, count), to, (asked, length)) in changes {
            let range = &mut model[page as usize..(page + count) as usize];
            let changed = range.iter().filter(|state| **state != to).count() as u64;
            range.fill(to);
            generation += u64::from(changed > 0);
            prop_assert_eq!(ledger.set(pages(page, count), to, false), changed * PAGE_SIZE);
            prop_assert_eq!(ledger.generation(), generation);
            let private = model.iter().filter(|state| **state == State::Private).count() as u64;
            prop_assert_eq!(ledger.private_bytes(), private * PAGE_SIZE);
            let runs = model_runs(&model, asked, length);
            let uniform = (runs.len() == 1).then(|| runs[0].state);
            prop_assert_eq!(ledger.uniform(pages(asked, length)), uniform);
            prop_assert_eq!(ledger.state(asked * PAGE_SIZE), model[asked as usize]);
            let snapshot = ledger.snapshot();
            prop_assert_eq!(snapshot.runs_in(pages(asked, length)).collect::<Vec<_>>(), runs.clone());
            prop_assert_eq!(ledger.runs_in(pages(asked, length)), runs);
            prop_assert_eq!(snapshot.runs().collect::<Vec<_>>(), model_runs(&model, 0, PAGES));
            prop_assert_eq!(snapshot.state(asked * PAGE_SIZE), model[asked as usize]);
            prop_assert_eq!(snapshot.private_bytes(), private * PAGE_SIZE);
            prop_assert_eq!(snapshot.generation(), generation);
            prop_assert_eq!(snapshot.size(), PAGES * PAGE_SIZE);
        }
        prop_assert_eq!(first.runs().collect::<Vec<_>>(), model_runs(&vec![initial; PAGES as usize], 0, PAGES));
    }

    /// A change since a vCPU looked is never missed, and one before is taken for newer only where the vCPU had nothing to
    /// do with that part, and then once.
    #[test]
    fn what_changed_since_a_look_is_known(changes in vec((0..PAGES, any::<bool>(), 0..PAGES), 1..40)) {
        let ledger = ledger(State::Shared);
        let mut seen = ledger.look();
        let mut since = vec![false; PAGES as usize];
        for (page, enters, asked) in changes {
            let other = ledger.state(page * PAGE_SIZE).other();
            ledger.set(pages(page, 1), other, false);
            since[page as usize] = true;
            if enters {
                ledger.look_again(&mut seen);
                since.fill(false);
            }
            let at = asked * PAGE_SIZE;
            let generation = ledger.seen(&mut seen, at);
            let (state, changed) = ledger.state_and_changed(at, generation);
            prop_assert_eq!(state, ledger.state(at));
            prop_assert!(changed || !since[asked as usize], "missed a change of page {}", asked);
            if changed {
                ledger.look_again(&mut seen);
                since.fill(false);
                let generation = ledger.seen(&mut seen, at);
                prop_assert!(!ledger.state_and_changed(at, generation).1, "page {} changed for ever", asked);
            }
        }
    }
}

#[test]
fn the_parts_that_a_vcpu_asked_about_are_seen_when_it_enters() {
    let ledger = ledger(State::Shared);
    let mut seen = ledger.look();
    let range = pages(PART - 1, PART + 2);
    ledger.touch(&mut seen, &ledger.look_at(range));
    ledger.set(range, State::Private, false);
    ledger.look_again(&mut seen);
    for page in [PART - 1, PART, 2 * PART] {
        let generation = ledger.seen(&mut seen, page * PAGE_SIZE);
        assert!(!ledger.state_and_changed(page * PAGE_SIZE, generation).1);
    }
}

#[test]
fn no_two_hold_a_page_and_none_waits_for_ever() {
    const THREADS: u64 = 4;
    let ledger = ledger(State::Shared);
    let owners: Vec<AtomicU32> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 1..=THREADS {
            let (ledger, owners, failed) = (&ledger, &owners, &failed);
            scope.spawn(move || {
                let mut random = thread;
                for _ in 0..400 {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(thread);
                    let first = (random >> 33) % PAGES;
                    let count = 1 + (random >> 13) % (PAGES - first);
                    let _held = ledger.hold(pages(first, count));
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
    let ledger = ledger(State::Private);
    let max = 4 * PAGE_SIZE;
    assert!(ledger.reserve(3 * PAGE_SIZE, max));
    assert!(!ledger.reserve(2 * PAGE_SIZE, max));
    assert_eq!(ledger.set(pages(PART - 1, 2), State::Shared, true), 2 * PAGE_SIZE);
    assert!(!ledger.reserve(2 * PAGE_SIZE, max));
    ledger.release(PAGE_SIZE);
    assert!(ledger.reserve(2 * PAGE_SIZE, max));
}
