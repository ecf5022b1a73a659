//! Threads that begin runs, stop them and close the machine.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;

const ROUNDS: usize = if cfg!(miri) { 4 } else { 2000 };
const PATIENCE: Duration = Duration::from_secs(60);

fn control() -> Arc<Control> {
    Arc::new(Control::new(Vec::new(), false))
}

fn until(condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE);
        thread::yield_now();
    }
}

#[test]
fn a_stop_is_not_lost_once_a_run_is_entered() {
    let current = Current::default();
    for _ in 0..ROUNDS {
        let control = control();
        thread::scope(|scope| {
            scope.spawn(|| {
                current.enter().unwrap();
                current.begin(control.clone());
                until(|| control.leaving());
                current.over(0);
            });
            until(|| current.running());
            current.stop("stopped");
        });
        assert_eq!(control.take_end().unwrap(), "stopped");
        assert!(!current.running());
    }
}

#[test]
fn a_closed_machine_begins_no_run_and_one_that_runs_is_not_closed() {
    for _ in 0..ROUNDS {
        let current = Current::default();
        let closed = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    loop {
                        let was_closed = closed.load(Ordering::SeqCst);
                        if current.enter().is_ok() {
                            assert!(current.close().is_err(), "it was closed while it began");
                            current.begin(control());
                            assert!(!was_closed, "it began after it was closed");
                            assert!(current.close().is_err(), "it was closed while it ran");
                            assert!(!closed.load(Ordering::SeqCst));
                            current.over(0);
                        } else if was_closed {
                            break;
                        }
                        thread::yield_now();
                    }
                });
            }
            until(|| current.close().is_ok());
            closed.store(true, Ordering::SeqCst);
        });
        assert!(current.changeable().is_err());
    }
}
