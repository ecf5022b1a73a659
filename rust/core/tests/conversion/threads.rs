//! Conversions, reads and writes by several threads at once.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use pagegate_core::error::Error;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::memory::conversion::Converted;

use crate::common::within_patience;
use crate::random::Random;
use crate::setup::{Setup, every_setup, states};

/// Sets the flag when it drops, also in a panic.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Threads convert the same few pages in opposite directions, in batches; after each batch KVM must have been told
/// what the map says.
fn convert_at_once(setup: Setup, threads: u64, batches: u64) {
    let (fake, machine) = setup.machine();
    let over = AtomicBool::new(false);
    let machine = &machine;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut last = 0;
            while !over.load(Ordering::SeqCst) {
                let snapshot = machine.memory().snapshot();
                assert!(snapshot.generation() >= last, "the generation went back");
                last = snapshot.generation();
                let private = snapshot.runs().filter(|run| run.state == State::Private);
                let sum: u64 = private.map(|run| run.range.size()).sum();
                assert_eq!(sum, snapshot.private_bytes(), "a snapshot shows half a conversion");
                let mut bytes = [0; 8];
                match machine.read(5 * PAGE_SIZE, &mut bytes) {
                    Ok(()) | Err(Error::PrivateMemory { gpa: 0x5000, .. }) => {}
                    other => panic!("{other:?}"),
                }
                std::thread::yield_now();
            }
        });
        let ended = Over(&over);
        for batch in 0..batches {
            let start = Barrier::new(threads as usize);
            std::thread::scope(|scope| {
                for thread in 0..threads {
                    let start = &start;
                    scope.spawn(move || {
                        let to = if thread % 2 == 0 { State::Private } else { State::Shared };
                        let mut random = Random(1 + batch * threads + thread);
                        start.wait();
                        for _ in 0..4 {
                            let first = random.below(6);
                            let size = (1 + random.below(3)) * PAGE_SIZE;
                            let done = machine.memory().convert(first * PAGE_SIZE, size, to, false);
                            assert!(
                                matches!(done, Ok(Converted::Done { changed }) if changed <= size),
                                "{done:?}"
                            );
                        }
                    });
                }
            });
            setup.check_told(&fake, &states(machine));
        }
        drop(ended);
        reader.join().unwrap();
    });
}

#[test]
fn opposite_conversions_of_overlapping_ranges_leave_kvm_as_the_map_says() {
    for setup in every_setup() {
        for (threads, vcpus) in [(2, 1), (4, 2)] {
            let setup = Setup {
                vcpus,
                pages: 8,
                ..setup
            };
            within_patience(move || convert_at_once(setup, threads, 100));
        }
    }
}

/// A store by the host comes before a conversion, which discards it, or is refused because the page is private.
#[test]
fn a_store_does_not_slip_into_a_page_that_becomes_private() {
    for setup in every_setup().into_iter().step_by(3) {
        within_patience(move || {
            let (_, machine) = setup.machine();
            let over = AtomicBool::new(false);
            machine.convert(0, 0x4000, State::Shared).unwrap();
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        while !over.load(Ordering::SeqCst) {
                            match machine.write(0x1ff8, &[7; 16]) {
                                Ok(()) | Err(Error::PrivateMemory { gpa: 0x1000, .. }) => {}
                                other => panic!("{other:?}"),
                            }
                        }
                    });
                }
                let _ended = Over(&over);
                for _ in 0..300 {
                    machine.convert(0x1000, 0x2000, State::Private).unwrap();
                    // The host writes no other page, so nothing of the shared side may be resident now.
                    let shared = match machine.resident() {
                        Ok(resident) => resident.shared,
                        Err(Error::NotSupported(_)) => 0,
                        other => panic!("{other:?}"),
                    };
                    assert_eq!(shared, 0, "a private page has bytes on the shared side");
                    machine.convert(0x1000, 0x2000, State::Shared).unwrap();
                    std::thread::yield_now();
                }
            });
        });
    }
}

#[test]
fn disjoint_conversions_at_once_count_every_byte() {
    for setup in every_setup() {
        within_patience(move || {
            let (fake, machine) = setup.machine();
            let machine = &machine;
            let sums: Vec<u64> = std::thread::scope(|scope| {
                let workers = (0..4).map(|thread| {
                    scope.spawn(move || {
                        let mut sum = 0;
                        for round in 0..100_u64 {
                            let to = if round % 2 == 0 {
                                setup.initial.other()
                            } else {
                                setup.initial
                            };
                            let gpa = thread * 16 * PAGE_SIZE;
                            match machine.memory().convert(gpa, 16 * PAGE_SIZE, to, false).unwrap() {
                                Converted::Done { changed } => sum += changed,
                                Converted::Superseded | Converted::Interrupted { .. } => panic!("nobody else was here"),
                            }
                        }
                        sum
                    })
                });
                let workers: Vec<_> = workers.collect();
                workers.into_iter().map(|worker| worker.join().unwrap()).collect()
            });
            assert_eq!(sums, [100 * 16 * PAGE_SIZE; 4]);
            assert_eq!(machine.memory().generation(), 400);
            setup.check_told(&fake, &states(machine));
        });
    }
}
