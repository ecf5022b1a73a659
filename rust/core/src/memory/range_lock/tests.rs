//! No page is held twice, overlapping ranges are given out in order, and every waiter gets its range.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use super::*;
use crate::memory::address::PAGE_SIZE;
use crate::memory::random::Random;

const PAGES: u64 = 64;
/// Fewer under Miri, where each takes some 1,000 times as long.
const LOCKS: u64 = if cfg!(miri) { 40 } else { 2000 };
const PATIENCE: Duration = Duration::from_secs(30);

fn pages(first: u64, count: u64) -> Range {
    Range::new(first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
}

/// Fails if `body` hangs.
fn within_patience(body: impl FnOnce() + Send + 'static) {
    let (done, finished) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        body();
        done.send(()).unwrap();
    });
    match finished.recv_timeout(PATIENCE) {
        Ok(()) => thread.join().unwrap(),
        Err(mpsc::RecvTimeoutError::Disconnected) => std::panic::resume_unwind(thread.join().unwrap_err()),
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("still waiting for a range after {PATIENCE:?}"),
    }
}

fn any_range(random: &mut Random) -> Range {
    let first = random.below(PAGES);
    let longest = if random.below(4) == 0 {
        PAGES - first
    } else {
        (PAGES - first).min(4)
    };
    pages(first, 1 + random.below(longest))
}

/// Waits until this many threads hold a range or wait for one.
fn until_queued(locks: &RangeLocks<()>, count: usize) {
    let begun = Instant::now();
    while locks.inner.lock().queue.entries.len() < count {
        assert!(begun.elapsed() < PATIENCE, "no thread queues");
        std::thread::yield_now();
    }
}

/// Waits until this many threads sleep.
fn until_waiting(locks: &RangeLocks<()>, count: usize) {
    let begun = Instant::now();
    while locks.inner.lock().queue.waiting < count {
        assert!(begun.elapsed() < PATIENCE, "no thread waits");
        std::thread::yield_now();
    }
}

#[test]
fn overlapping_ranges_are_never_held_together() {
    within_patience(|| {
        let locks = RangeLocks::new(());
        let owners: Vec<AtomicU32> = (0..PAGES).map(|_| AtomicU32::new(0)).collect();
        let locked = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 1..=6_u32 {
                let (locks, owners, locked) = (&locks, &owners, &locked);
                scope.spawn(move || {
                    let mut random = Random(0x9e37_79b9 * u64::from(thread));
                    for _ in 0..LOCKS {
                        let count = [1, 1, 2, 3][random.below(4) as usize];
                        let ranges: Vec<Range> = (0..count).map(|_| any_range(&mut random)).collect();
                        let held = match ranges[..] {
                            [range] => locks.lock(range),
                            _ => locks.lock_all_and_access(&ranges).0,
                        };
                        let mine = ranges
                            .iter()
                            .flat_map(|range| range.gpa() / PAGE_SIZE..range.end() / PAGE_SIZE);
                        let mine = std::collections::BTreeSet::from_iter(mine);
                        let swap = |page: &u64, to| owners[*page as usize].swap(to, Ordering::SeqCst);
                        for page in &mine {
                            assert_eq!(swap(page, thread), 0, "someone else holds page {page} of {ranges:?}");
                        }
                        if random.below(8) == 0 {
                            std::thread::yield_now();
                        }
                        for page in &mine {
                            assert_eq!(swap(page, 0), thread, "someone took page {page} of {ranges:?}");
                        }
                        drop(held);
                        locked.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        // Every lock was taken, and no entry is left in the queue.
        assert_eq!(locked.into_inner(), 6 * LOCKS);
        let queue = &locks.inner.lock().queue;
        assert_eq!((queue.entries.len(), queue.waiting), (0, 0));
    });
}

#[test]
fn disjoint_ranges_do_not_wait() {
    within_patience(|| {
        let locks = RangeLocks::new(());
        let low = locks.lock(pages(0, 4));
        std::thread::scope(|scope| {
            // Joined while the other range is held.
            let neighbour = scope.spawn(|| drop(locks.lock(pages(4, 4))));
            neighbour.join().unwrap();
        });
        drop(low);
    });
}

#[test]
fn a_large_range_is_not_overtaken_by_what_it_waits_with() {
    within_patience(|| {
        let locks = RangeLocks::new(());
        let order = Mutex::new(Vec::new());
        let first = locks.lock(pages(0, 1));
        std::thread::scope(|scope| {
            let take = |name: &'static str, range: Range, queued: usize| {
                let (locks, order) = (&locks, &order);
                scope.spawn(move || {
                    let _held = locks.lock(range);
                    order.lock().push(name);
                });
                until_queued(locks, queued);
            };
            take("large", pages(0, PAGES), 2);
            // Nothing holds page 5, but the large range asked first.
            take("small", pages(5, 1), 3);
            take("smaller", pages(5, 1), 4);
            until_waiting(&locks, 3);
            assert!(order.lock().is_empty());
            drop(first);
        });
        assert_eq!(*order.lock(), ["large", "small", "smaller"]);
    });
}

#[test]
fn a_large_range_gets_its_turn_while_small_ones_keep_coming() {
    within_patience(|| {
        let locks = Arc::new(RangeLocks::new(()));
        let over = AtomicBool::new(false);
        let small = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (locks, over, small) = (&locks, &over, &small);
                scope.spawn(move || {
                    let mut random = Random(thread + 1);
                    while !over.load(Ordering::SeqCst) {
                        // Some page is held at all times: others ask before this one is given back.
                        let first = random.below(PAGES / 2);
                        let _held = locks.lock(pages(2 * first + thread % 2, 1));
                        small.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            while small.load(Ordering::SeqCst) < 10 {
                std::thread::yield_now();
            }
            for _ in 0..LOCKS / 10 {
                drop(locks.lock(pages(0, PAGES)));
            }
            over.store(true, Ordering::SeqCst);
        });
    });
}

#[test]
fn first_come_first_served_on_one_page() {
    within_patience(|| {
        let locks = RangeLocks::new(());
        let order = Mutex::new(Vec::new());
        let held = locks.lock(pages(7, 1));
        std::thread::scope(|scope| {
            for i in 0..8_usize {
                let (locks, order) = (&locks, &order);
                scope.spawn(move || {
                    let _held = locks.lock(pages(7, 1));
                    order.lock().push(i);
                });
                until_queued(locks, i + 2);
            }
            drop(held);
        });
        assert_eq!(*order.lock(), Vec::from_iter(0..8));
    });
}

#[test]
fn a_guard_of_no_range_gives_back_nothing() {
    let locks = RangeLocks::new(());
    let held = locks.lock(pages(0, 1));
    let entries = || locks.inner.lock().queue.entries.len();
    let none = locks.lock_all_and_access(&[]).0;
    drop(none);
    assert_eq!(entries(), 1, "the range of another is given back");
    drop(held);
    assert_eq!(entries(), 0);
}

#[test]
fn a_range_is_free_again_after_a_panic() {
    let locks = RangeLocks::new(());
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _held = locks.lock(pages(0, PAGES));
        std::panic::resume_unwind(Box::new(()));
    }));
    assert!(caught.is_err());
    drop(locks.lock(pages(0, 1)));
}
