//! Policies that fail: hooks that return errors, panic, or decide what is no decision.

use std::time::{Duration, Instant};

use pagegate_core::error::Error;
use pagegate_core::events::event::Outcome;
use pagegate_core::hypervisor::fake::Step;
use pagegate_core::memory::address::{PAGE_SIZE, State};

use crate::common::within_patience;
use crate::guest::*;

#[test]
fn a_failed_hook_ends_the_run_and_is_asked_again() {
    let failing = || Err("no idea");
    let requests = both_ways([12, 0x5000, 1, TO_PRIVATE]);
    for (setup, step) in [
        (PLAIN, requests[0].clone()),
        (PLAIN, requests[1].clone()),
        (SPLIT, private_view(0x5000, false)),
        (MEMSLOTS, private_view(0x5000, false)),
    ] {
        let judge = Judge {
            fault: Box::new(once(failing())),
            call: Box::new(once(failing())),
            ..Judge::allow()
        };
        let guest = setup.guest(vec![vec![step]], judge);
        match guest.try_run() {
            Err(Error::Hook { site, failure }) => {
                assert_eq!((site.vcpu, site.gpa, site.state), (0, Some(0x5000), Some("shared")));
                assert_eq!(failure.to_string(), "no idea");
            }
            other => panic!("{other:?}"),
        }
        assert!(
            guest.fake.replies(0).is_empty(),
            "a request that nobody judged was answered"
        );
        assert_eq!(guest.state(0x5000), State::Shared);
        assert_eq!(guest.run().reason, "halt");
        assert_eq!(guest.judge.faults.lock().len() + guest.judge.calls.lock().len(), 2);
        assert_eq!(guest.state(0x5000), State::Private);
        assert!(guest.fake.replies(0).iter().all(|reply| reply.value == [0; 8]));
        assert_eq!(guest.outcomes(), [Outcome::Failed, Outcome::Converted]);
    }
}

#[test]
fn a_decision_outside_memory_is_a_hook_error() {
    for (gpa, size) in [
        (0x5000, PAGES * PAGE_SIZE),
        (0x5001, PAGE_SIZE),
        (0x5000, 0),
        (u64::MAX, u64::MAX),
    ] {
        let judge = Judge {
            fault: Box::new(move |_| Ok(convert_at(gpa, size))),
            call: Box::new(move |_| Ok(convert_at(gpa, size))),
            ..Judge::allow()
        };
        let script = vec![private_view(0x5000, false)];
        let guest = SPLIT.guest(vec![script], judge);
        assert!(matches!(guest.try_run(), Err(Error::Hook { .. })));
        let judge = Judge::calls(move |_| Ok(convert_at(gpa, size)));
        let guest = PLAIN.guest(vec![vec![map_gpa_range(0x5000, 1, TO_PRIVATE)]], judge);
        assert!(matches!(guest.try_run(), Err(Error::Hook { .. })));
        assert_eq!(guest.machine.memory().snapshot().generation(), 0);
    }
}

#[test]
fn only_the_first_failure_is_reported() {
    let judge = Judge::calls(|call| Err(format!("vCPU {}", call.vcpu).into()));
    let guest = PLAIN.guest(vec![vec![map_gpa_range(0x5000, 1, TO_PRIVATE)]; 4], judge);
    assert!(matches!(guest.try_run(), Err(Error::Hook { .. })));
    // In the second run the pending requests are put to the policy again, and those not asked yet for the first time.
    assert!(matches!(guest.try_run(), Err(Error::Hook { .. })));
}

#[test]
fn a_panic_in_a_hook_ends_the_run_and_leaves_the_machine_usable() {
    within_patience(|| {
        let judge = Judge::calls(|_| std::panic::resume_unwind(Box::new("a hook's own")));
        let guest = PLAIN.guest(
            vec![vec![map_gpa_range(0x5000, 1, TO_PRIVATE)], vec![Step::Block; 5000]],
            judge,
        );
        let timeout = Duration::from_secs(4);
        let run = std::panic::AssertUnwindSafe(|| guest.machine.run(Some(timeout), &mut || Ok(())));
        let begun = Instant::now();
        let panic = std::panic::catch_unwind(run).unwrap_err();
        assert_eq!(panic.downcast_ref(), Some(&"a hook's own"));
        assert!(begun.elapsed() < timeout / 2, "the other vCPU was not brought out");
        assert!(!guest.machine.running(), "the machine stays busy");
    });
}
