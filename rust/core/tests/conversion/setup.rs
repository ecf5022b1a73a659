//! Machines on the fake, over each way of enforcement, and what can be asked of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use pagegate_core::error::{ConvertError, Error};
use pagegate_core::hypervisor::fake::{CallName, FakeVm};
use pagegate_core::hypervisor::host::EnforcementMode;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::Config;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::memory::conversion::Converted;
use pagegate_core::policy::simple::Allow;

use crate::common::{BIT, check_told, limits};

pub const ALL_CALLS: [CallName; 4] = [
    CallName::SetAttributes,
    CallName::CreateMemslot,
    CallName::DeleteMemslot,
    CallName::Discard,
];

/// A machine without vCPU threads. `parts` is how many slots its memory begins with.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub mode: EnforcementMode,
    pub split: bool,
    pub pages: u64,
    pub parts: u32,
    pub memslots: u32,
    pub vcpus: u32,
    pub initial: State,
}

impl Setup {
    pub fn machine(&self) -> (Arc<FakeVm>, Machine) {
        let fake = Arc::new(FakeVm::new(limits(self.mode, self.memslots), Vec::new(), 1));
        let config = Config {
            vcpus: self.vcpus,
            enforcement: Some(self.mode),
            shared_bit: self.split.then_some(BIT),
            initial: self.initial,
            events: 16,
            memslots: self.parts,
            hypervisor: Some(fake.clone()),
            ..Config::new(self.pages * PAGE_SIZE, Arc::new(Allow))
        };
        (fake, Machine::new(config).unwrap())
    }

    /// How many slots these states need, each as large as it can be.
    pub fn slots(&self, states: &[State]) -> usize {
        let border =
            |page: u64| (1..u64::from(self.parts)).any(|part| page == self.pages * part / u64::from(self.parts));
        let starts = |wanted: &dyn Fn(State) -> bool| {
            let begins = |page: usize| page == 0 || border(page as u64) || !wanted(states[page - 1]);
            (0..states.len())
                .filter(|page| wanted(states[*page]) && begins(*page))
                .count()
        };
        let all = starts(&|_| true);
        let private = starts(&|state| state == State::Private);
        let shared = starts(&|state| state == State::Shared);
        match (self.mode, self.split) {
            (EnforcementMode::Attributes, false) => all,
            (EnforcementMode::Attributes, true) => all + private,
            (EnforcementMode::Traps, _) => 2 * all,
            (EnforcementMode::Memslots, _) => private + shared,
        }
    }

    /// Checks that KVM was told that the pages are in these states, in as few slots as that takes.
    pub fn check_told(&self, fake: &FakeVm, states: &[State]) {
        for (page, state) in states.iter().enumerate() {
            let gpa = page as u64 * PAGE_SIZE;
            check_told(fake, self.mode, self.split, gpa, *state);
        }
        assert_eq!(fake.slot_count(), self.slots(states));
    }
}

pub fn states(machine: &Machine) -> Vec<State> {
    let snapshot = machine.memory().snapshot();
    let pages = 0..snapshot.size() / PAGE_SIZE;
    pages.map(|page| snapshot.state(page * PAGE_SIZE)).collect()
}

pub fn pages(first: u64, count: u64) -> Range {
    Range::new(first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
}

/// How often each of these calls was made.
pub type Calls = BTreeMap<CallName, u64>;

pub fn calls(fake: &FakeVm) -> Calls {
    ALL_CALLS.iter().map(|call| (*call, fake.calls(*call))).collect()
}

pub fn every_setup() -> Vec<Setup> {
    let mut setups = Vec::new();
    for mode in EnforcementMode::ALL {
        let splits = match mode {
            EnforcementMode::Traps => vec![true],
            EnforcementMode::Attributes | EnforcementMode::Memslots => vec![false, true],
        };
        for split in splits {
            for initial in [State::Shared, State::Private] {
                setups.push(Setup {
                    mode,
                    split,
                    pages: 64,
                    parts: 2,
                    memslots: 512,
                    vcpus: 1,
                    initial,
                });
            }
        }
    }
    setups
}

pub fn error(result: Result<Converted, Error>) -> ConvertError {
    match result {
        Err(Error::HostConversion(error)) => error,
        other => panic!("{other:?}"),
    }
}
