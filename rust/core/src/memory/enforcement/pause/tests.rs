//! vCPUs that enter the guest and leave it, against threads that pause them.
#![allow(missing_docs)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

const ENTRIES: usize = if cfg!(miri) { 10 } else { 2000 };

#[test]
fn no_vcpu_is_in_the_guest_during_a_pause_and_all_go_on_after_it() {
    let (pause, in_guest) = (Pause::default(), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _vcpu in 0..3 {
            scope.spawn(|| {
                for _ in 0..ENTRIES {
                    let _in_guest = pause.enter();
                    in_guest.fetch_add(1, Ordering::SeqCst);
                    thread::yield_now();
                    in_guest.fetch_sub(1, Ordering::SeqCst);
                }
            });
        }
        for _pauser in 0..2 {
            scope.spawn(|| {
                for _ in 0..ENTRIES / 2 {
                    let _paused = pause.pause();
                    assert_eq!(in_guest.load(Ordering::SeqCst), 0);
                    thread::yield_now();
                    assert_eq!(in_guest.load(Ordering::SeqCst), 0);
                }
            });
        }
    });
    let counts = pause.counts.lock();
    assert_eq!((counts.in_guest, counts.pauses), (0, 0));
}
