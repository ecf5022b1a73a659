//! A kick against a vCPU that is about to enter KVM_RUN. tests/miri runs this under many schedules, and with stores that
//! become visible late.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Barrier;
use std::thread;

use super::*;

const ROUNDS: usize = if cfg!(miri) { 4 } else { 2000 };

struct Byte(AtomicU8);

impl ImmediateExit for Byte {
    fn byte(&self) -> &AtomicU8 {
        &self.0
    }
}

/// What KVM_RUN does: returns at once if the byte is set, else stays until `over`. Returns whether it stayed.
fn kvm_run(byte: &AtomicU8, over: &AtomicBool) -> bool {
    // KVM locks the vCPU before it looks at the byte.
    fence(Ordering::SeqCst);
    if byte.load(Ordering::Relaxed) != 0 {
        return false;
    }
    while !over.load(Ordering::Acquire) {
        thread::yield_now();
    }
    true
}

/// `earlier`: what earlier kicks left in the byte. `others`: how many kicks come at the same time that are not because of
/// the run's end.
fn a_kick_at_the_end_of_the_run(earlier: u8, others: usize) {
    let kick = Kick::new(Arc::new(Byte(AtomicU8::new(earlier))));
    let (leaving, over) = (AtomicBool::new(false), AtomicBool::new(false));
    // A thread takes longer to start than a kick takes.
    let all_here = Barrier::new(2 + others);
    let (stayed, signalled) = thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            let byte = kick.immediate_exit();
            all_here.wait();
            while !(kicked(byte) && leaving.load(Ordering::SeqCst)) {
                if kick.inside(|| kvm_run(byte, &over)) {
                    return true;
                }
            }
            false
        });
        for _ in 0..others {
            scope.spawn(|| {
                all_here.wait();
                kick.set_immediate_exit();
            });
        }
        all_here.wait();
        leaving.store(true, Ordering::SeqCst);
        let signalled = kick.set_immediate_exit();
        over.store(true, Ordering::Release);
        (vcpu.join().unwrap(), signalled)
    });
    assert!(!stayed || signalled, "the vCPU is in the guest, and gets no signal");
}

#[test]
fn a_kick_is_not_lost() {
    for _ in 0..ROUNDS {
        for (earlier, others) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            a_kick_at_the_end_of_the_run(earlier, others);
        }
    }
}

/// How many signals wait, of all the user's processes.
fn queued() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("SigQ:")).unwrap();
    line.trim().split('/').next().unwrap().parse().unwrap()
}

#[test]
#[cfg_attr(miri, ignore = "Miri sends no signals")]
fn kicks_of_a_vcpu_that_stays_do_not_fill_the_signal_queue() {
    const KICKS: i64 = 20_000;
    let _installed = signal::Installed::install().unwrap();
    let kick = Kick::new(Arc::new(Byte(AtomicU8::new(0))));
    let barrier = Barrier::new(2);
    thread::scope(|scope| {
        scope.spawn(|| {
            let _attached = kick.attach().unwrap();
            vmm_sys_util::signal::block_signal(signal::number()).unwrap();
            kick.inside(|| {
                barrier.wait();
                barrier.wait();
            });
        });
        barrier.wait();
        let before = queued();
        (0..KICKS).for_each(|_| kick.kick());
        let more = queued() - before;
        barrier.wait();
        assert!(more < KICKS / 2, "{more} signals wait");
    });
    assert_eq!((0..1 << 20).filter(|before| sends(*before)).count(), 8 + 17);
}
