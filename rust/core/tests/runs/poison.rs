//! Poisoned pages: EHWPOISON is put to a hook of its own, and nothing is converted.

use pagegate_core::errno::Errno;
use pagegate_core::error::Error;
use pagegate_core::events::event::{Kind, Outcome};
use pagegate_core::memory::address::State;
use pagegate_core::policy::decision::Decision;

use crate::guest::*;

#[test]
fn a_poisoned_page_is_never_converted() {
    let guest = PLAIN.guest(vec![vec![poison(0x5000)]], Judge::allow());
    let report = guest.run();
    assert_eq!(
        (report.reason.as_str(), report.tally.poisons, report.tally.requests()),
        ("poison", 1, 0)
    );
    let seen = guest.judge.poisons.lock()[0];
    assert_eq!(
        (seen.errno, seen.state, seen.range.gpa()),
        (Errno(libc::EHWPOISON), State::Shared, 0x5000)
    );
    assert_eq!(
        (guest.events()[0].kind, guest.outcomes()),
        (Kind::Poison, vec![Outcome::Stopped])
    );
    assert!(guest.judge.faults.lock().is_empty());

    let guest = PLAIN.guest(
        vec![vec![poison(0x5000)]],
        Judge::poisons(|_| Ok(Decision::Deny(Errno(5)))),
    );
    assert_eq!(
        (guest.run().reason.as_str(), guest.outcomes()),
        ("denied", vec![Outcome::Denied])
    );

    let guest = PLAIN.guest(vec![vec![poison(0x5000); 3]], Judge::poisons(|_| Ok(Decision::Retry)));
    let report = guest.run();
    assert_eq!(
        (report.reason.as_str(), report.tally.poisons, report.tally.retries),
        ("halt", 3, 3)
    );
    let repeats: Vec<u32> = guest.judge.poisons.lock().iter().map(|poison| poison.repeats).collect();
    assert_eq!(repeats, [0, 1, 2]);

    let guest = PLAIN.guest(vec![vec![poison(0x5000)]], Judge::poisons(|_| Ok(Decision::as_asked())));
    assert!(matches!(guest.try_run(), Err(Error::Hook { .. })));
    assert_eq!(guest.state(0x5000), State::Shared);
}
