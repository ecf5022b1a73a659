//! Explicit requests, by hypercall and by doorbell.

use std::sync::Arc;

use pagegate_core::errno::Errno;
use pagegate_core::error::{ConvertError, Error};
use pagegate_core::events::event::{Kind, Outcome};
use pagegate_core::hypervisor::fake::{CallName, Injection};
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::policy::decision::Decision;

use crate::common::BIT;
use crate::guest::*;

#[test]
fn each_decision_has_its_answer() {
    let stop = || Decision::Stop("enough".to_owned());
    let cases = [
        (Decision::as_asked(), 0, Outcome::Converted, State::Private),
        (convert_at(0x4000, 0x8000), 0, Outcome::Converted, State::Private),
        (convert_at(0x6000, 0x1000), 0, Outcome::Converted, State::Shared),
        (convert_to(State::Shared), 0, Outcome::Converted, State::Shared),
        (
            Decision::Deny(Errno(libc::EPERM)),
            libc::EPERM,
            Outcome::Denied,
            State::Shared,
        ),
        (
            Decision::Deny(Errno(libc::EINVAL)),
            libc::EINVAL,
            Outcome::Denied,
            State::Shared,
        ),
        (Decision::Retry, libc::EAGAIN, Outcome::Retried, State::Shared),
        (stop(), libc::EAGAIN, Outcome::Stopped, State::Shared),
    ];
    for setup in [PLAIN, SPLIT, TRAPS, MEMSLOTS] {
        for (decision, errno, outcome, state) in &cases {
            for step in both_ways([12, 0x5000, 2, TO_PRIVATE | 1]) {
                let answer = decision.clone();
                let judge = Judge::calls(move |_| Ok(answer.clone()));
                let guest = setup.clone().guest(vec![vec![step]], judge);
                let report = guest.run();
                // The guest has its answer when the run returns, also where this request ended the run.
                assert_eq!(guest.answers(0), [(0, i64::from(*errno))], "{decision:?}");
                let reason = if *decision == stop() { "enough" } else { "halt" };
                assert_eq!(report.reason, reason);
                assert_eq!(guest.outcomes(), [*outcome]);
                assert_eq!(guest.events()[0].errno, *errno);
                assert_eq!(guest.state(0x5000), *state, "{decision:?}");
                let call = guest.judge.calls.lock()[0];
                assert_eq!(
                    (call.range.gpa(), call.range.size(), call.to),
                    (0x5000, 0x2000, State::Private)
                );
                assert_eq!(
                    (call.page_size, call.raw, call.state),
                    (2 << 20, 0x11, Some(State::Shared))
                );
                assert_eq!(
                    (report.tally.hypercalls, report.tally.requests(), report.tally.faults),
                    (1, 1, 0)
                );
                let counted =
                    [Outcome::Denied, Outcome::Retried, Outcome::Converted].map(|kind| u64::from(kind == *outcome));
                assert_eq!(
                    [report.tally.denied, report.tally.retries, report.tally.conversions],
                    counted
                );
                guest.agrees(&setup);
            }
        }
    }
}

#[test]
fn malformed_requests_do_not_reach_the_policy() {
    let requests = [
        ([12, 0x5001, 1, TO_PRIVATE], libc::EINVAL.into()),
        ([12, 0x5000, 0, TO_PRIVATE], libc::EINVAL.into()),
        ([12, 0x1000, 1 << 52, TO_PRIVATE], libc::EINVAL.into()),
        ([12, 0, PAGES + 1, TO_PRIVATE], libc::EINVAL.into()),
        ([12, 0, 1, 0x20], libc::EINVAL.into()),
        ([12, 0, 1, 3], libc::EINVAL.into()),
        ([11, 0, 1, TO_PRIVATE], -1000_i64),
        ([u64::MAX, 0, 1, TO_PRIVATE], -1000),
    ];
    for which in 0..2 {
        let script = requests.iter().map(|(request, _)| both_ways(*request)[which].clone());
        let guest = PLAIN.guest(vec![script.collect()], Judge::allow());
        let report = guest.run();
        let answers: Vec<i64> = guest.answers(0).iter().map(|(_, answer)| *answer).collect();
        assert_eq!(answers, requests.map(|(_, answer)| answer));
        assert_eq!((report.tally.malformed, report.tally.requests()), (8, 0));
        assert!(guest.judge.calls.lock().is_empty());
        // Each but the unknown hypercalls has a row, with what the guest gave.
        let rows = guest.machine.events().since(0);
        let told: Vec<_> = rows
            .iter()
            .map(|row| (row.kind, row.outcome, row.gpa, row.size, row.raw))
            .collect();
        let given = requests[..6].iter().map(|([_, gpa, pages, raw], _)| {
            let size = pages.saturating_mul(PAGE_SIZE);
            (Kind::Malformed, Outcome::Refused, *gpa, size, *raw as u32)
        });
        assert_eq!(told, given.collect::<Vec<_>>());
        assert_eq!(guest.machine.memory().snapshot().generation(), 0);
    }
}

#[test]
fn a_request_that_changes_nothing_reaches_the_policy() {
    let script = vec![
        map_gpa_range(0x5000, 2, TO_SHARED),
        map_gpa_range(0x5000, 1, TO_PRIVATE),
        map_gpa_range(0x4000, 2, TO_PRIVATE),
    ];
    let guest = PLAIN.guest(vec![script], Judge::allow());
    let report = guest.run();
    assert_eq!(guest.answers(0), [(0, 0), (1, 0), (2, 0)]);
    assert_eq!((report.tally.hypercalls, report.tally.conversions), (3, 3));
    assert_eq!(report.tally.bytes_to_private, 2 * PAGE_SIZE);
    let changed: Vec<u64> = guest.events().iter().map(|event| event.changed).collect();
    assert_eq!(changed, [0, PAGE_SIZE, PAGE_SIZE]);
    let states: Vec<Option<State>> = guest.judge.calls.lock().iter().map(|call| call.state).collect();
    assert_eq!(states, [Some(State::Shared), Some(State::Shared), None]);
}

#[test]
fn the_shared_bit_of_an_address_is_stripped() {
    let step = map_gpa_range(0x5000 | 1 << BIT, 1, TO_PRIVATE);
    let guest = SPLIT.guest(vec![vec![step]], Judge::allow());
    guest.run();
    assert_eq!(guest.judge.calls.lock()[0].range.gpa(), 0x5000);
    assert_eq!(guest.state(0x5000), State::Private);
}

#[test]
fn the_guest_gets_the_errno_of_a_conversion_that_fails() {
    let fail = |call, forever| Injection {
        call,
        after: 0,
        errno: libc::ENOMEM,
        half_done: true,
        forever,
    };
    let script = || {
        vec![vec![
            map_gpa_range(0x5000, 4, TO_PRIVATE),
            map_gpa_range(0x5000, 4, TO_PRIVATE),
        ]]
    };
    let guest = PLAIN.guest(script(), Judge::allow());
    guest.fake.inject(fail(CallName::SetAttributes, false));
    let report = guest.run();
    assert_eq!(guest.answers(0), [(0, libc::ENOMEM.into()), (1, 0)]);
    assert_eq!(guest.outcomes(), [Outcome::Failed, Outcome::Converted]);
    assert_eq!((guest.events()[0].errno, report.tally.conversions), (libc::ENOMEM, 1));
    guest.agrees(&PLAIN);

    let guest = MEMSLOTS.guest(vec![vec![map_gpa_range(0x5000, 1, TO_PRIVATE)]], Judge::allow());
    for page in 0..PAGES / 2 - 8 {
        guest
            .machine
            .convert(2 * page * PAGE_SIZE, PAGE_SIZE, State::Private)
            .unwrap();
    }
    guest.run();
    assert_eq!(guest.answers(0), [(0, 0)]);

    // An undo or a discard that fails ends the run, and the request is not answered.
    for injection in [fail(CallName::SetAttributes, true), fail(CallName::Discard, false)] {
        let guest = PLAIN.guest(script(), Judge::allow());
        guest.fake.inject(injection);
        match guest.try_run() {
            Err(Error::Conversion { site, source }) => {
                assert_eq!((site.vcpu, site.gpa), (0, Some(0x5000)));
                assert_eq!(source.guest_errno(), None);
                let discarding = matches!(source, ConvertError::Partly { .. });
                assert_eq!(discarding, injection.call == CallName::Discard);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(guest.answers(0), []);
        assert_eq!(guest.outcomes(), [Outcome::Failed]);
    }
}

#[test]
fn the_policy_is_asked_again_if_the_pages_are_not_as_it_was_told() {
    // What the hook itself converts before it answers, from the first page on; the state that the recorded decision was
    // told of; how many bytes its conversion changes.
    type Case = (&'static [(u64, State)], Option<State>, u64);
    let cases: [Case; 4] = [
        (&[(2, State::Private)], Some(State::Private), 0),
        (&[(1, State::Private)], None, PAGE_SIZE),
        (
            &[(2, State::Private), (2, State::Shared)],
            Some(State::Shared),
            2 * PAGE_SIZE,
        ),
        (&[(2, State::Private), (1, State::Shared)], None, PAGE_SIZE),
    ];
    for setup in [PLAIN, SPLIT, TRAPS, MEMSLOTS] {
        for (by_hook, state, changed) in cases {
            let late = Arc::new(Late::default());
            let inner = late.clone();
            let judge = Judge::calls(move |call| {
                for (pages, to) in by_hook {
                    inner.get().convert(call.range.gpa(), pages * PAGE_SIZE, *to)?;
                }
                Ok(Decision::as_asked())
            });
            let guest = setup
                .clone()
                .guest(vec![vec![map_gpa_range(0x5000, 2, TO_PRIVATE)]], judge);
            late.set(&guest);
            assert_eq!(guest.run().tally.conversions, 1);
            let events = guest.events();
            assert_eq!(events.len(), 1);
            assert_eq!(
                (events[0].state, events[0].changed, events[0].errno),
                (state, changed, 0)
            );
            assert_eq!(
                guest.judge.calls.lock().len(),
                if state == Some(State::Shared) { 1 } else { 2 }
            );
            assert_eq!(
                [0x5000, 0x6000].map(|gpa| guest.state(gpa)),
                [State::Private, State::Private]
            );
            guest.agrees(&setup);
        }
    }
}

#[test]
fn running_out_of_memslots_is_enospc() {
    let setup = Setup {
        memslots: 3,
        ..MEMSLOTS
    };
    let script = vec![
        map_gpa_range(0x5000, 1, TO_PRIVATE),
        map_gpa_range(0x7000, 1, TO_PRIVATE),
    ];
    let guest = setup.clone().guest(vec![script], Judge::allow());
    guest.run();
    assert_eq!(guest.answers(0), [(0, 0), (1, libc::ENOSPC.into())]);
    guest.agrees(&setup);
}
