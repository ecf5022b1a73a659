//! What the tests of runs and of conversions share: what KVM has to be told of a page, and a bound on how long a test
//! may take.

use std::sync::mpsc;
use std::time::Duration;

use pagegate_core::hypervisor::fake::FakeVm;
use pagegate_core::hypervisor::host::EnforcementMode;
use pagegate_core::hypervisor::vm::Capabilities;
use pagegate_core::memory::address::State;

/// The bit of a guest-physical address that means shared, where pages have two views.
pub const BIT: u32 = 40;

/// A host that has what this way of enforcement needs.
pub fn limits(mode: EnforcementMode, memslots: u32) -> Capabilities {
    match mode {
        EnforcementMode::Attributes | EnforcementMode::Traps => FakeVm::protected(memslots),
        EnforcementMode::Memslots => FakeVm::plain(memslots),
    }
}

/// What KVM has to be told of a page in `state`: for each view its address, its slot (and whether it has a
/// guest_memfd), and whether it carries PRIVATE. `split` is whether there are two views.
fn told(mode: EnforcementMode, split: bool, gpa: u64, state: State) -> Vec<(u64, Option<bool>, bool)> {
    let private = state == State::Private;
    let shared_view = gpa | 1 << BIT;
    match (mode, split) {
        (EnforcementMode::Attributes, false) => vec![(gpa, Some(true), private)],
        (EnforcementMode::Attributes, true) => vec![
            (gpa, private.then_some(true), true),
            (shared_view, Some(false), private),
        ],
        // Whether there is one view or two: traps need two.
        (EnforcementMode::Traps, _) => vec![(gpa, Some(false), !private), (shared_view, Some(false), private)],
        (EnforcementMode::Memslots, false) => vec![(gpa, Some(private), false)],
        (EnforcementMode::Memslots, true) => vec![
            (gpa, private.then_some(true), false),
            (shared_view, (!private).then_some(false), false),
        ],
    }
}

/// Checks that KVM was told so of the page at `gpa`.
pub fn check_told(fake: &FakeVm, mode: EnforcementMode, split: bool, gpa: u64, state: State) {
    for (at, slot, private) in told(mode, split, gpa, state) {
        assert_eq!(fake.slot_at(at), slot, "the slot at {at:#x} of a {state} page");
        assert_eq!(fake.is_private(at), private, "PRIVATE at {at:#x} of a {state} page");
    }
}

/// Fails if `body` hangs.
pub fn within_patience(body: impl FnOnce() + Send + 'static) {
    const PATIENCE: Duration = Duration::from_secs(40);
    let (done, finished) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        body();
        done.send(()).unwrap();
    });
    match finished.recv_timeout(PATIENCE) {
        Ok(()) => thread.join().unwrap(),
        Err(mpsc::RecvTimeoutError::Disconnected) => std::panic::resume_unwind(thread.join().unwrap_err()),
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it does not end within {PATIENCE:?}"),
    }
}
