//! Instructions that read memory and write it back, which KVM emulates and the core takes back: also while others convert
//! their page all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pagegate_core::error::Error;
use pagegate_core::hypervisor::fake::Step;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::policy::decision::Decision;
use pagegate_core::vcpu::running::LIVELOCK_BOUND;

use crate::common::BIT;
use crate::guest::*;

const PRIVATE: u64 = 0x5008;
const SHARED: u64 = PRIVATE | 1 << BIT;
/// How long a run may take to end once it was told to.
const PROMPT: Duration = Duration::from_millis(100);

/// An instruction that KVM emulates whatever memslots there are.
fn emulated(gpa: u64) -> Step {
    Step::Modify { gpa, native: false }
}

/// For ever, within a test.
fn endless(setup: Setup) -> Setup {
    Setup {
        cycles: u64::MAX,
        events: 64,
        ..setup
    }
}

#[test]
fn an_instruction_that_writes_back_what_it_read_is_executed_again() {
    let script = [PRIVATE, PRIVATE, SHARED, SHARED]
        .map(|gpa| Step::Modify { gpa, native: true })
        .to_vec();
    let guest = MEMSLOTS.guest(vec![script], Judge::allow());
    let start = guest.machine.regs(0).unwrap().rip;
    let report = guest.run();
    assert_eq!((report.reason.as_str(), report.tally.conversions), ("halt", 2));
    // Where it was asked from, and that nothing was executed twice or left out: HLT is the fifth instruction.
    let rips: Vec<u64> = guest
        .judge
        .faults
        .lock()
        .iter()
        .map(|fault| fault.rip - start)
        .collect();
    assert_eq!(rips, [0, 2]);
    assert_eq!(guest.machine.regs(0).unwrap().rip - start, 5);
    // What KVM's emulation would have written is not there.
    let mut bytes = [0xff; 8];
    guest.machine.read(PRIVATE, &mut bytes).unwrap();
    assert_eq!((guest.state(0x5000), bytes), (State::Shared, [0; 8]));
    guest.agrees(&MEMSLOTS);
}

#[test]
fn one_that_is_emulated_each_time_is_a_livelock_error() {
    for (gpa, state, requests) in [(PRIVATE, "private", 1), (SHARED, "shared", 0)] {
        let guest = endless(MEMSLOTS).guest(vec![vec![emulated(gpa)]], Judge::allow());
        // The next run goes on with the same read.
        for _ in 0..2 {
            match guest.try_run() {
                Err(Error::Livelock {
                    site, access, repeats, ..
                }) => {
                    assert_eq!((site.gpa, site.state), (Some(0x5000), Some(state)));
                    assert_eq!((access, repeats), (state, LIVELOCK_BOUND));
                }
                other => panic!("{other:?}"),
            }
        }
        // None about a page that is as accessed.
        assert_eq!(guest.judge.faults.lock().len(), requests);
    }
}

/// What ends a run of an instruction that is retried for ever.
#[derive(Clone, Copy, Debug)]
enum End {
    Stop,
    Timeout,
    Interrupt,
}

/// Runs the guest for a moment, ends the run, and returns how long the end took. If it takes too long, `let_go` has to make
/// the guest end by itself.
fn time_to_end(guest: &Guest, end: End, let_go: &AtomicBool) -> Duration {
    const MOMENT: Duration = Duration::from_millis(150);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            let timeout = match end {
                End::Timeout => MOMENT,
                _ => Duration::from_secs(20),
            };
            let mut interrupt = || match end {
                End::Interrupt if begun.elapsed() >= MOMENT => Err("interrupted".into()),
                _ => Ok(()),
            };
            guest.machine.run(Some(timeout), &mut interrupt)
        });
        std::thread::sleep(MOMENT);
        if let End::Stop = end {
            guest.machine.stop();
        }
        while !run.is_finished() && begun.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let took = begun.elapsed() - MOMENT;
        let_go.store(true, Ordering::SeqCst);
        match (end, run.join().unwrap()) {
            (End::Stop, Ok(report)) => assert_eq!(report.reason, "stopped"),
            (End::Timeout, Ok(report)) => assert_eq!(report.reason, "timeout"),
            (End::Interrupt, Err(Error::Interrupted(_))) => {}
            other => panic!("{other:?}"),
        }
        took
    })
}

/// The fastest of a few, since other work may keep the processors busy.
fn ends_promptly(end: End, measure: impl Fn() -> Duration) {
    let took = (0..5).map(|_| measure()).find(|took| *took < PROMPT);
    assert!(took.is_some(), "{end:?} does not end it");
}

/// The host converts the page to and fro each time before the policy's answer is carried out, so that the core looks again
/// within one exit.
#[test]
fn a_page_that_the_host_converts_all_the_time_does_not_keep_a_run_from_ending() {
    for end in [End::Stop, End::Timeout, End::Interrupt] {
        ends_promptly(end, || {
            let late = Arc::new(Late::default());
            let let_go = Arc::new(AtomicBool::new(false));
            let (inner, goes) = (late.clone(), let_go.clone());
            let judge = Judge::faults(move |fault| {
                if goes.load(Ordering::SeqCst) {
                    return Ok(Decision::as_asked());
                }
                for to in [State::Private, State::Shared] {
                    inner.get().convert(fault.range.gpa(), PAGE_SIZE, to)?;
                }
                Ok(Decision::Retry)
            });
            let setup = Setup {
                cycles: 1,
                ..endless(MEMSLOTS)
            };
            let guest = setup.guest(vec![vec![emulated(PRIVATE)]], judge);
            late.set(&guest);
            let took = time_to_end(&guest, end, &let_go);
            // Each is a request, and the newest are in the log.
            assert!(
                guest.judge.faults.lock().len() > LIVELOCK_BOUND as usize,
                "too few to mean anything"
            );
            assert_eq!(guest.events().len(), 64);
            took
        });
    }
}

/// Another vCPU converts the page to and fro, so that the instruction is taken back again and again.
#[test]
fn a_page_that_another_vcpu_converts_all_the_time_does_not_keep_a_run_from_ending() {
    for end in [End::Stop, End::Timeout, End::Interrupt] {
        ends_promptly(end, || {
            let scripts = vec![
                vec![emulated(PRIVATE)],
                vec![shared_view(PRIVATE, true), private_view(PRIVATE, true)],
            ];
            let guest = endless(MEMSLOTS).guest(scripts, Judge::allow());
            let took = time_to_end(&guest, end, &AtomicBool::new(false));
            let faults = guest.judge.faults.lock();
            assert!(faults.iter().any(|fault| fault.vcpu == 1) && faults.len() > 100);
            drop(faults);
            assert!(guest.events().len() <= 64);
            guest.agrees(&MEMSLOTS);
            took
        });
    }
}
