//! How a run ends: stop, timeout, interrupt, halt, shutdown.

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use pagegate_core::boot::start::CpuMode;
use pagegate_core::error::{Error, Failure};
use pagegate_core::hypervisor::fake::Step;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::memory::listeners::{Change, Listener};
use pagegate_core::policy::decision::Decision;

use crate::common::within_patience;
use crate::guest::*;

/// The fastest of a few attempts, since other work may keep the processors busy.
fn fastest(measure: impl Fn() -> Duration) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..5 {
        best = best.min(measure());
        if best < Duration::from_millis(100) {
            break;
        }
    }
    best
}

#[test]
fn stop_ends_a_run_whose_vcpus_stay_in_kvm_run() {
    for setup in [PLAIN, MEMSLOTS] {
        let took = fastest(|| {
            let mut script = vec![io_read(0x10, 1)];
            script.extend(vec![Step::Block; 50]);
            let guest = setup.clone().guest(vec![script; 3], Judge::allow());
            std::thread::scope(|scope| {
                let run = scope.spawn(|| guest.run());
                guest.wait_for_vcpus_in_kvm_run(3);
                let begun = Instant::now();
                guest.machine.stop();
                assert_eq!(run.join().unwrap().reason, "stopped");
                begun.elapsed()
            })
        });
        assert!(took < Duration::from_millis(100), "{took:?}");
    }
}

#[test]
fn a_timeout_ends_a_run_whose_vcpus_stay_in_kvm_run() {
    let took = fastest(|| {
        let guest = PLAIN.guest(vec![vec![Step::Block; 50]; 2], Judge::allow());
        let begun = Instant::now();
        let timeout = Duration::from_millis(40);
        let report = guest.machine.run(Some(timeout), &mut || Ok(())).unwrap();
        assert_eq!(report.reason, "timeout");
        assert!(report.duration >= timeout);
        begun.elapsed() - timeout
    });
    assert!(took < Duration::from_millis(100), "{took:?}");
}

#[test]
fn a_run_that_timed_out_can_be_continued() {
    let guest = PLAIN.guest(
        vec![vec![Step::Block, map_gpa_range(0x5000, 1, TO_PRIVATE)]],
        Judge::allow(),
    );
    let run = |milliseconds| {
        let timeout = Duration::from_millis(milliseconds);
        guest.machine.run(Some(timeout), &mut || Ok(())).unwrap().reason
    };
    // The first step ends only with a kick. How many short runs it takes to get past it is up to the scheduler.
    assert_eq!(run(20), "timeout");
    for _ in 0..100 {
        match run(50).as_str() {
            "timeout" => {}
            reason => {
                assert_eq!(reason, "halt");
                assert_eq!(guest.state(0x5000), State::Private);
                return;
            }
        }
    }
    panic!("the guest makes no progress");
}

#[test]
fn a_timeout_of_zero_ends_the_run() {
    let guest = PLAIN.guest(vec![vec![Step::Block; 50]], Judge::allow());
    for _ in 0..3 {
        let report = guest.machine.run(Some(Duration::ZERO), &mut || Ok(())).unwrap();
        assert_eq!(report.reason, "timeout");
    }
}

#[test]
fn the_callers_interrupt_ends_the_run() {
    let guest = PLAIN.guest(vec![vec![Step::Block; 50]], Judge::allow());
    let mut asked = 0;
    let ended = guest.machine.run(Some(Duration::from_secs(20)), &mut || {
        asked += 1;
        if asked == 3 { Err("interrupted".into()) } else { Ok(()) }
    });
    assert!(matches!(ended, Err(Error::Interrupted(_))), "{ended:?}");
}

#[test]
fn the_last_halt_or_the_first_shutdown_ends_the_run() {
    let guest = PLAIN.guest(vec![Vec::new(), vec![Step::Halt], vec![Step::Halt]], Judge::allow());
    assert_eq!(guest.run().reason, "halt");
    let guest = PLAIN.guest(vec![vec![Step::Block; 50], vec![Step::Shutdown]], Judge::allow());
    assert_eq!(guest.run().reason, "shutdown");
    // A vCPU that shut down has to be started again.
    let guest = PLAIN.guest(vec![vec![Step::Shutdown]], Judge::allow());
    assert_eq!(guest.run().reason, "shutdown");
    assert!(matches!(guest.try_run(), Err(Error::Busy(_))));
    guest.start(0);
    assert_eq!(guest.run().reason, "halt");
}

/// Stops the machine when pages were converted, which takes a while.
struct StopsIt {
    told: mpsc::Sender<()>,
    stop: Late,
}

impl Listener for StopsIt {
    fn prepare(&self, _: &Change) -> Result<bool, Failure> {
        Ok(true)
    }

    fn committed(&self, change: &Change) -> Result<(), Failure> {
        if !change.initial {
            self.told.send(())?;
            // The other thread is in `run` by then, as a rule, and waits for the vCPU.
            std::thread::sleep(Duration::from_millis(100));
            self.stop.get().stop();
        }
        Ok(())
    }

    fn aborted(&self, _: &Change) -> Result<(), Failure> {
        Ok(())
    }
}

#[test]
fn a_listener_stops_a_machine_that_another_thread_begins_to_run() {
    within_patience(|| {
        let guest = Setup {
            initial: State::Private,
            ..SPLIT
        };
        let guest = guest.guest(vec![vec![]], Judge::allow());
        // The tables are shared by now.
        let all = PAGES * PAGE_SIZE;
        guest.machine.convert(0, all, State::Private).unwrap();
        let (told, starting) = mpsc::channel();
        let listener = Arc::new(StopsIt {
            told,
            stop: Late::default(),
        });
        listener.stop.set(&guest);
        guest.machine.add_listener(listener.clone()).unwrap();
        std::thread::scope(|scope| {
            // Where this thread is late, the run has the vCPU first, and may be what is stopped.
            scope.spawn(|| match guest.machine.start(0, CpuMode::Long, &[], &mut || Ok(())) {
                Ok(()) | Err(Error::Busy(_)) => {}
                Err(error) => panic!("{error}"),
            });
            starting.recv().unwrap();
            let reason = guest.run().reason;
            assert!(["halt", "stopped"].contains(&reason.as_str()), "{reason}");
        });
    });
}

#[test]
fn a_running_machine_is_busy() {
    let late = Arc::new(Late::default());
    let inner = late.clone();
    let judge = Judge::calls(move |_| {
        let machine = inner.get();
        assert!(matches!(machine.run(None, &mut || Ok(())), Err(Error::Busy(_))));
        assert!(matches!(
            machine.start(0, CpuMode::Real, &[], &mut || Ok(())),
            Err(Error::Busy(_))
        ));
        assert!(matches!(machine.regs(0), Err(Error::Busy(_))));
        // The pages of a request are not locked while the policy decides.
        machine.convert(0x5000, PAGE_SIZE, State::Private)?;
        Ok(Decision::as_asked())
    });
    let guest = PLAIN.guest(vec![vec![map_gpa_range(0x5000, 1, TO_PRIVATE)]], judge);
    late.set(&guest);
    assert_eq!(guest.run().reason, "halt");
    assert_eq!(guest.answers(0), [(0, 0)]);
    assert!(!guest.machine.running());
    assert!(guest.machine.regs(0).is_ok());
}
