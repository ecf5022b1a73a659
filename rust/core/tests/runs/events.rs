//! What is recorded of a run: the event log and the report's counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pagegate_core::errno::Errno;
use pagegate_core::events::event::{Event, Outcome};
use pagegate_core::memory::address::State;
use pagegate_core::policy::decision::Decision;
use pagegate_core::policy::request::ExplicitRequest;

use crate::guest::*;

#[test]
fn the_event_log_is_bounded_and_in_order() {
    for (room, expected) in [(0, 0), (8, 8), (7, 8), (1000, 200)] {
        let setup = Setup {
            events: room,
            cycles: 50,
            ..PLAIN
        };
        let scripts = |gpa| vec![map_gpa_range(gpa, 1, TO_PRIVATE), map_gpa_range(gpa, 1, TO_SHARED)];
        let guest = setup.guest(vec![scripts(0x5000), scripts(0x7000)], Judge::allow());
        let report = guest.run();
        assert_eq!(report.tally.hypercalls, 200);
        let log = guest.machine.events();
        assert_eq!((log.total(), log.kept()), (200, expected));
        let events = log.since(0);
        assert_eq!(events.len(), expected);
        assert!(events.is_sorted_by(|a, b| a.sequence < b.sequence));
        for vcpu in 0..2 {
            // The newest ones are kept.
            let own: Vec<&Event> = events.iter().filter(|event| event.vcpu == vcpu).collect();
            assert_eq!(own.len(), expected / 2);
            assert!(own.last().is_none_or(|last| last.to == State::Shared));
            assert!(own.is_sorted_by(|a, b| a.time <= b.time));
        }
        if let Some(middle) = events.get(expected / 2) {
            let later = log.since(middle.sequence);
            assert_eq!(later, events[expected / 2..]);
        }
        assert!(log.since(200).is_empty());
    }
}

#[test]
fn the_latency_of_a_request_ends_when_the_guest_resumes() {
    let guest = PLAIN.guest(
        vec![vec![map_gpa_range(0x5000, 1, TO_PRIVATE), io_read(0x10, 1)]],
        Judge::allow(),
    );
    let pause = Duration::from_millis(50);
    let total = Arc::new(AtomicU32::new(0));
    let seen = total.clone();
    let look = handler(move |machine| {
        seen.store(machine.events().total() as u32, Ordering::SeqCst);
        std::thread::sleep(pause);
        Ok(())
    });
    look.machine.set(&guest);
    guest.machine.on_io(0x10, look).unwrap();
    let begun = Instant::now();
    let report = guest.run();
    let all = begun.elapsed();
    assert_eq!(total.load(Ordering::SeqCst), 1, "not recorded when the guest went on");
    let latency = Duration::from_nanos(guest.events()[0].latency);
    assert!(
        latency + pause <= all,
        "{latency:?} of {all:?} with a pause of {pause:?}"
    );
    assert!(report.tally.latency.max() > 0);
}

#[test]
fn event_sequence_numbers_go_on_from_run_to_run() {
    let judge = Judge::calls(once(Ok(Decision::Stop("enough".to_owned()))));
    let guest = PLAIN.guest(vec![vec![map_gpa_range(0x5000, 1, TO_PRIVATE); 3]], judge);
    assert_eq!(guest.run().tally.hypercalls, 1);
    assert_eq!(guest.run().tally.hypercalls, 2);
    let sequences: Vec<u64> = guest.events().iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, [0, 1, 2]);
}

#[test]
fn a_report_counts_the_requests_of_all_vcpus() {
    // Each vCPU has pages of its own. Of its five requests one is denied, one retried, and one malformed.
    let script = |vcpu: u64| {
        let at = 0x8000 * (vcpu + 1);
        vec![
            map_gpa_range(at, 4, TO_PRIVATE),
            map_gpa_range(at, 4, TO_SHARED),
            map_gpa_range(at + 0x4000, 1, TO_PRIVATE),
            map_gpa_range(at + 0x5000, 1, TO_PRIVATE),
            map_gpa_range(at, 0, TO_PRIVATE),
        ]
    };
    let decide = |call: &ExplicitRequest| match call.range.gpa() % 0x8000 {
        0x4000 => Ok(Decision::Deny(Errno(libc::EPERM))),
        0x5000 => Ok(Decision::Retry),
        _ => Ok(Decision::as_asked()),
    };
    for setup in [PLAIN, MEMSLOTS] {
        let setup = Setup { cycles: 25, ..setup };
        let guest = setup.clone().guest((0..4).map(script).collect(), Judge::calls(decide));
        let report = guest.run();
        let tally = &report.tally;
        assert_eq!(report.reason, "halt");
        assert_eq!((tally.hypercalls, tally.requests(), tally.malformed), (400, 400, 100));
        assert_eq!((tally.conversions, tally.denied, tally.retries), (200, 100, 100));
        assert_eq!(
            (tally.bytes_to_private, tally.bytes_to_shared),
            (100 * 0x4000, 100 * 0x4000)
        );
        assert_eq!((tally.latency.len(), tally.faults, tally.poisons), (400, 0, 0));
        assert!(report.duration > Duration::ZERO);
        // The event log has the same counts.
        let events = guest.events();
        let count = |outcome| events.iter().filter(|event| event.outcome == outcome).count();
        let counts = [Outcome::Converted, Outcome::Denied, Outcome::Retried].map(count);
        assert_eq!(counts, [200, 100, 100]);
        assert_eq!(events.iter().map(|event| event.changed).sum::<u64>(), 2 * 100 * 0x4000);
        guest.agrees(&setup);
    }
}
