//! Creating a machine with a large memory, which takes KVM long, can be given up.
#![allow(clippy::unwrap_used, missing_docs)]

use std::sync::Arc;

use pagegate_core::error::Error;
use pagegate_core::hypervisor::fake::FakeVm;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::Config;
use pagegate_core::memory::address::State;
use pagegate_core::policy::simple::Allow;

fn config(initial: State) -> Config {
    Config {
        initial,
        hypervisor: Some(Arc::new(FakeVm::new(FakeVm::plain(512), Vec::new(), 1))),
        ..Config::new(64 << 30, Arc::new(Allow))
    }
}

#[test]
fn the_watch_is_called_for_each_memslot() {
    for initial in [State::Shared, State::Private] {
        let mut calls = 0;
        let mut watch = || {
            calls += 1;
            Ok(())
        };
        let machine = Machine::new_watched(config(initial), &mut watch).unwrap();
        assert!(calls >= 64, "a memslot has a GiB at most, and there were {calls} calls");
        let private = if initial == State::Private { 64 << 30 } else { 0 };
        assert_eq!(machine.memory().snapshot().private_bytes(), private);
    }
}

#[test]
fn its_failure_ends_the_creation() {
    let mut left = 5;
    let mut watch = || {
        left -= 1;
        match left {
            0 => Err("enough".into()),
            _ => Ok(()),
        }
    };
    let made = Machine::new_watched(config(State::Shared), &mut watch);
    assert!(matches!(made, Err(Error::Interrupted(_))));
    assert_eq!(left, 0);
}
