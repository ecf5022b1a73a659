//! Implicit requests: accesses through the view that a page is not in, and memory faults.

use std::sync::Arc;

use pagegate_core::errno::Errno;
use pagegate_core::error::Error;
use pagegate_core::events::event::{Kind, Outcome};
use pagegate_core::hypervisor::fake::{Reply, Step};
use pagegate_core::hypervisor::host::EnforcementMode;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::policy::decision::Decision;
use pagegate_core::vcpu::running::LIVELOCK_BOUND;

use crate::common::BIT;
use crate::guest::*;

#[test]
fn an_access_through_the_other_view_is_a_request_in_both_directions() {
    for setup in [SPLIT, TRAPS, MEMSLOTS] {
        let script = vec![
            private_view(0x5008, true),
            private_view(0x5010, true),
            shared_view(0x5018, true),
            shared_view(0x5020, true),
            shared_view(0x6000, true),
        ];
        let guest = setup.clone().guest(vec![script], Judge::allow());
        let report = guest.run();
        assert_eq!(report.reason, "halt");
        let faults = guest.judge.faults.lock().clone();
        assert_eq!(faults.len(), 2);
        for (fault, access, flags) in [(faults[0], State::Private, PRIVATE_FLAG), (faults[1], State::Shared, 0)] {
            assert_eq!((fault.range.gpa(), fault.range.size()), (0x5000, PAGE_SIZE));
            assert_eq!((fault.access, fault.state), (access, access.other()));
            assert_eq!((fault.vcpu, fault.repeats, fault.errno), (0, 0, Errno(libc::EFAULT)));
            // With attributes the view that the page is not in always carries PRIVATE, so the fault says private.
            let flags = if setup.mode == EnforcementMode::Memslots {
                flags
            } else {
                PRIVATE_FLAG
            };
            assert_eq!(fault.flags, flags);
        }
        let tally = &report.tally;
        assert_eq!(
            (tally.requests(), tally.faults, tally.hypercalls, tally.conversions),
            (2, 2, 0, 2)
        );
        assert_eq!((tally.bytes_to_private, tally.bytes_to_shared), (PAGE_SIZE, PAGE_SIZE));
        assert_eq!(
            (tally.denied, tally.retries, tally.stale, tally.latency.len()),
            (0, 0, 0, 2)
        );
        let events = guest.events();
        assert_eq!(events.len(), 2);
        for (i, (event, to)) in events.iter().zip([State::Private, State::Shared]).enumerate() {
            assert_eq!((event.sequence, event.vcpu, event.kind), (i as u64, 0, Kind::Implicit));
            assert_eq!((event.gpa, event.size, event.to), (0x5000, PAGE_SIZE, to));
            assert_eq!(
                (event.done_gpa, event.done_size, event.done_to),
                (0x5000, PAGE_SIZE, to)
            );
            assert_eq!(
                (event.outcome, event.changed, event.errno),
                (Outcome::Converted, PAGE_SIZE, 0)
            );
            assert!(event.latency > 0);
        }
        assert!(events[0].time <= events[1].time);
        guest.agrees(&setup);
    }
}

#[test]
fn an_emulated_store_goes_to_the_side_of_its_view() {
    let stored = 0x1122_3344_5566_7788_u64;
    // The host reads the shared side: only what was stored through the shared view is there.
    let guest = MEMSLOTS.guest(
        vec![vec![private_view(0x5008, true), shared_view(0x5010, true)]],
        Judge::allow(),
    );
    guest.run();
    let mut bytes = [0xff; 0x20];
    guest.machine.read(0x5000, &mut bytes).unwrap();
    assert_eq!(bytes[0x10..0x18], stored.to_le_bytes());
    assert!(
        bytes[..0x10].iter().chain(&bytes[0x18..]).all(|byte| *byte == 0),
        "private bytes came out"
    );
}

#[test]
fn discarded_pages_read_as_zeroes() {
    let script = vec![
        private_view(0x5008, true),
        io_write(0x10),
        private_view(0x5008, false),
        shared_view(0x5008, false),
    ];
    let guest = MEMSLOTS.guest(vec![script], Judge::allow());
    let to_shared = handler(|machine| {
        machine.convert(0x5000, PAGE_SIZE, State::Shared).unwrap();
        Ok(())
    });
    to_shared.machine.set(&guest);
    guest.machine.on_io(0x10, to_shared).unwrap();
    guest.machine.write(0x5000, &[0xaa; 4096]).unwrap();
    guest.run();
    let loads: Vec<Reply> = guest
        .fake
        .replies(0)
        .into_iter()
        .filter(|reply| reply.step >= 2)
        .collect();
    let zeroes = |step| Reply {
        step,
        value: vec![0; 8],
    };
    assert_eq!(loads, [zeroes(2), zeroes(3)]);
}

#[test]
fn a_denied_access_ends_the_run_and_is_asked_again_by_the_next() {
    for setup in [SPLIT, TRAPS, MEMSLOTS] {
        let judge = Judge::faults(once(Ok(Decision::Deny(Errno(libc::EPERM)))));
        let guest = setup.clone().guest(vec![vec![private_view(0x5000, false)]], judge);
        let report = guest.run();
        assert_eq!(
            (report.reason.as_str(), report.tally.denied, report.tally.faults),
            ("denied", 1, 1)
        );
        assert_eq!(guest.state(0x5000), State::Shared);
        assert_eq!(guest.events()[0].errno, libc::EPERM);
        let report = guest.run();
        assert_eq!(
            (report.reason.as_str(), report.tally.denied, report.tally.conversions),
            ("halt", 0, 1)
        );
        assert_eq!(guest.judge.faults.lock().len(), 2);
        assert_eq!(guest.outcomes(), [Outcome::Denied, Outcome::Converted]);
        guest.agrees(&setup);
    }
}

#[test]
fn a_retried_access_is_asked_again_and_says_how_often() {
    for setup in [SPLIT, TRAPS, MEMSLOTS] {
        let judge = Judge::faults(|fault| match fault.repeats {
            5 => Ok(Decision::as_asked()),
            _ => Ok(Decision::Retry),
        });
        let guest = setup.guest(
            vec![vec![private_view(0x5000, false), private_view(0x7000, false)]],
            judge,
        );
        let report = guest.run();
        assert_eq!(
            (report.reason.as_str(), report.tally.retries, report.tally.conversions),
            ("halt", 10, 2)
        );
        let repeats: Vec<u32> = guest.judge.faults.lock().iter().map(|fault| fault.repeats).collect();
        assert_eq!(repeats, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]);
        assert_eq!(report.tally.latency.len(), 12);
    }
}

#[test]
fn retrying_for_ever_is_a_livelock() {
    for setup in [SPLIT, TRAPS, MEMSLOTS] {
        let judge = Judge::faults(|_| Ok(Decision::Retry));
        let guest = setup.guest(vec![vec![private_view(0x5000, false)]], judge);
        let report = guest.run();
        assert_eq!(
            (report.reason.as_str(), report.tally.retries),
            ("livelock", LIVELOCK_BOUND.into())
        );
        assert_eq!(guest.judge.faults.lock().len(), LIVELOCK_BOUND as usize);
    }
}

#[test]
fn a_fault_that_repeats_though_the_page_is_as_accessed_is_a_livelock_error() {
    let setup = Setup {
        initial: State::Private,
        cycles: 2 * u64::from(LIVELOCK_BOUND),
        ..PLAIN
    };
    let guest = setup.guest(vec![vec![memory_fault(PRIVATE_FLAG, 0x5000)]], Judge::allow());
    match guest.try_run() {
        Err(Error::Livelock {
            site, access, repeats, ..
        }) => {
            assert_eq!((site.vcpu, site.gpa, site.state), (0, Some(0x5000), Some("private")));
            assert_eq!((access, repeats), ("private", LIVELOCK_BOUND));
        }
        other => panic!("{other:?}"),
    }
    assert!(
        guest.judge.faults.lock().is_empty(),
        "the policy was asked about a page that is as accessed"
    );
    assert_eq!(guest.machine.events().total(), 0);
}

#[test]
fn a_policy_that_stops_the_run_gives_the_reason() {
    for setup in [SPLIT, TRAPS, MEMSLOTS] {
        let judge = Judge::faults(once(Ok(Decision::Stop("enough".to_owned()))));
        let guest = setup.guest(vec![vec![private_view(0x5000, false)]], judge);
        assert_eq!(guest.run().reason, "enough");
        assert_eq!(guest.outcomes(), [Outcome::Stopped]);
        assert_eq!(guest.state(0x5000), State::Shared);
        assert_eq!(guest.run().reason, "halt");
        assert_eq!(guest.state(0x5000), State::Private);
    }
}

#[test]
fn a_conversion_wider_than_asked_is_recorded_as_done() {
    for setup in [SPLIT, TRAPS, MEMSLOTS] {
        let judge = Judge::faults(|_| Ok(convert_at(0x4000, 0x4000)));
        let script = vec![private_view(0x5000, false), private_view(0x7000, false)];
        let guest = setup.clone().guest(vec![script], judge);
        let report = guest.run();
        assert_eq!((report.tally.faults, report.tally.bytes_to_private), (1, 0x4000));
        let event = guest.events()[0];
        assert_eq!((event.gpa, event.size), (0x5000, PAGE_SIZE));
        assert_eq!(
            (event.done_gpa, event.done_size, event.changed),
            (0x4000, 0x4000, 0x4000)
        );
        guest.agrees(&setup);
    }
}

#[test]
fn a_request_whose_page_was_converted_meanwhile_is_superseded() {
    // The hook itself converts the page before it answers.
    let late = Arc::new(Late::default());
    let inner = late.clone();
    let judge = Judge::faults(move |fault| {
        inner
            .get()
            .convert(fault.range.gpa(), fault.range.size(), fault.access)?;
        Ok(Decision::as_asked())
    });
    let guest = SPLIT.guest(vec![vec![private_view(0x5000, false)]], judge);
    late.set(&guest);
    let report = guest.run();
    assert_eq!(guest.outcomes(), [Outcome::Superseded]);
    assert_eq!(
        (report.tally.faults, report.tally.conversions, report.tally.stale),
        (1, 0, 1)
    );
}

/// KVM reports a fault by the state that the page had when KVM looked, which another thread may have changed since.
#[test]
fn a_spurious_fault_does_not_undo_a_conversion() {
    for attempt in 0..6_u32 {
        // After the answer to the read it stays in KVM_RUN long enough for a conversion to happen meanwhile.
        let mut script = vec![io_read(0x10, 1)];
        script.extend(vec![private_view(0x1000, false); 100_000 << attempt.min(3)]);
        script.push(memory_fault(0, 0x5000));
        let guest = PLAIN.guest(vec![script], Judge::allow());
        let report = std::thread::scope(|scope| {
            scope.spawn(|| {
                guest.wait_for_vcpus_in_kvm_run(1);
                guest.machine.convert(0x5000, PAGE_SIZE, State::Private).unwrap();
            });
            guest.run()
        });
        assert!(
            guest.judge.faults.lock().is_empty(),
            "the policy was asked about an old state"
        );
        assert_eq!(guest.state(0x5000), State::Private, "a conversion was undone");
        // Where the conversion came only after the fault, the next attempt has more time for it.
        if report.tally.stale == 1 {
            return;
        }
    }
    panic!("no conversion happened while the vCPU was in KVM_RUN");
}

#[test]
fn fetching_code_through_the_other_view_is_a_request() {
    let guest = SPLIT.guest(vec![vec![Step::InternalError(1)]], Judge::allow());
    // The vCPU executes through the shared view of page 0, which is private by then.
    guest.machine.convert(0, PAGE_SIZE, State::Private).unwrap();
    assert_eq!(guest.run().tally.faults, 1);
    let fault = guest.judge.faults.lock()[0];
    assert_eq!(
        (fault.range.gpa(), fault.access, fault.rip),
        (0, State::Shared, (1 << BIT) + 1)
    );
    let guest = SPLIT.guest(vec![vec![Step::InternalError(1)]], Judge::allow());
    assert!(matches!(guest.try_run(), Err(Error::Exit { .. })));
    let guest = SPLIT.guest(vec![vec![Step::InternalError(3)]], Judge::allow());
    guest.machine.convert(0, PAGE_SIZE, State::Private).unwrap();
    assert!(matches!(guest.try_run(), Err(Error::Exit { .. })));
}
