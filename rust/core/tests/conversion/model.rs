//! A model of a machine: a list of pages, and the failures that are to come.

use pagegate_core::error::{ConvertError, Error};
use pagegate_core::hypervisor::fake::{CallName, FakeVm, Injection};
use pagegate_core::hypervisor::host::EnforcementMode;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::memory::conversion::Converted;

use crate::setup::{Calls, Setup, calls, states};

/// What a machine should be, page by page.
pub struct Model {
    setup: Setup,
    states: Vec<State>,
    /// The bytes of the shared side; `None` where discarding them failed, so that they may come back.
    bytes: Vec<Option<Vec<u8>>>,
    generation: u64,
    /// Calls that are to fail; `after` counts from the first call that the machine made.
    pub pending: Vec<Injection>,
    /// An undo failed: what KVM enforces is unknown, and the machine converts nothing any more.
    broken: bool,
}

impl Model {
    pub fn new(setup: Setup) -> Self {
        Self {
            setup,
            states: vec![setup.initial; setup.pages as usize],
            bytes: vec![Some(vec![0; PAGE_SIZE as usize]); setup.pages as usize],
            generation: 0,
            pending: Vec::new(),
            broken: false,
        }
    }

    fn first_private(&self, at: u64, len: u64) -> Option<u64> {
        let touched = at / PAGE_SIZE..=(at + len - 1) / PAGE_SIZE;
        let mut private = touched.filter(|page| self.states[*page as usize] == State::Private);
        private.next().map(|page| page * PAGE_SIZE)
    }

    /// The injected failures that the calls between these two counts ran into.
    fn failures(&self, before: &Calls, after: &Calls) -> Vec<Injection> {
        let hit = |injection: &&Injection| {
            let (from, to) = (before[&injection.call], after[&injection.call]);
            let last = if injection.forever { u64::MAX } else { injection.after };
            injection.after < to && from <= last && from < to
        };
        self.pending.iter().filter(hit).copied().collect()
    }

    pub fn convert(&mut self, fake: &FakeVm, machine: &Machine, range: Range, at: u64, (to, keep): (State, bool)) {
        let span = (range.gpa() / PAGE_SIZE) as usize..(range.end() / PAGE_SIZE) as usize;
        let differ: Vec<usize> = span.clone().filter(|page| self.states[*page] != to).collect();
        let mut wanted = self.states.clone();
        wanted[span.clone()].fill(to);
        let before = calls(fake);
        let result = machine.memory().convert(at, range.size(), to, keep);
        let after = calls(fake);
        let failures = self.failures(&before, &after);
        if self.broken {
            assert!(matches!(&result, Err(ConvertError::Inconsistent { .. })), "{result:?}");
            assert_eq!(before, after, "KVM was called although what it enforces is unknown");
            return;
        }
        if differ.is_empty() {
            assert_eq!(result.unwrap(), Converted::Done { changed: 0 });
            assert_eq!(before, after, "nothing to do, but KVM was called");
            return;
        }
        let errnos: Vec<i32> = failures.iter().map(|injection| injection.errno).collect();
        let discard_failed = failures.iter().any(|injection| injection.call == CallName::Discard);
        match result {
            Ok(Converted::Done { changed }) => {
                assert_eq!(errnos, [0_i32; 0], "a failure was overlooked");
                assert_eq!(changed, differ.len() as u64 * PAGE_SIZE);
                self.take_over(wanted, range, to, (!keep).then_some(true));
            }
            Err(ConvertError::Partly {
                gpa,
                size,
                changed,
                source,
            }) => {
                let ConvertError::Discard { errno, .. } = *source else {
                    panic!("{source:?}");
                };
                assert!(discard_failed && errnos.contains(&errno.0));
                assert_eq!((gpa, size), (range.gpa(), range.size()));
                assert_eq!(changed, differ.len() as u64 * PAGE_SIZE);
                assert!(!keep);
                self.take_over(wanted, range, to, Some(false));
            }
            Err(ConvertError::NoSlots {
                gpa,
                size,
                needed,
                available,
            }) => {
                assert_eq!((gpa, size), (range.gpa(), range.size()));
                assert!(needed > available && available <= self.setup.memslots as usize);
                assert!(self.setup.slots(&wanted) > self.setup.memslots as usize);
                assert_eq!(errnos, [0_i32; 0]);
            }
            Err(ConvertError::Undone { gpa, size, errno }) => {
                // Bytes that KVM's emulation left on the side that a page was not on are discarded first, before
                // anything changes.
                let cleaned = match self.setup.mode {
                    EnforcementMode::Attributes => to == State::Shared,
                    EnforcementMode::Traps => true,
                    EnforcementMode::Memslots => false,
                };
                assert!(
                    (cleaned || !discard_failed) && errnos.contains(&errno.0),
                    "{errno} is none of {errnos:?}"
                );
                assert_eq!((gpa, size), (range.gpa(), range.size()));
            }
            Err(ConvertError::Inconsistent { gpa, size, undo, .. }) => {
                assert!(
                    !discard_failed && errnos.contains(&undo.0),
                    "{undo} is none of {errnos:?}"
                );
                assert_eq!((gpa, size), (range.gpa(), range.size()));
                self.broken = true;
            }
            other => panic!("{other:?}"),
        }
        if self.setup.slots(&self.states) > self.setup.memslots as usize {
            panic!("more slots than there are");
        }
    }

    /// `discarded` is whether discarding the old side succeeded, `None` where it was to be kept.
    fn take_over(&mut self, states: Vec<State>, range: Range, to: State, discarded: Option<bool>) {
        let span = (range.gpa() / PAGE_SIZE) as usize..(range.end() / PAGE_SIZE) as usize;
        for page in span.filter(|_| to == State::Private) {
            let bytes = &mut self.bytes[page];
            match (discarded, self.states[page]) {
                (None, _) => {}
                (Some(true), State::Shared) => *bytes = Some(vec![0; PAGE_SIZE as usize]),
                (Some(false), State::Shared) => *bytes = None,
                // Bytes that were kept earlier: a conversion that does not change the page may discard them or not.
                (Some(_), State::Private) => drop(bytes.take_if(|bytes| bytes.iter().any(|byte| *byte != 0))),
            }
        }
        self.states = states;
        self.generation += 1;
    }

    pub fn write(&mut self, machine: &Machine, at: u64, len: u64, byte: u8) {
        // The bytes depend on their address, so that bytes in a wrong place are found.
        let data: Vec<u8> = (at..at + len).map(|at| byte ^ (at / 64) as u8).collect();
        let result = machine.write(at, &data);
        match self.first_private(at, len) {
            Some(first) => {
                assert!(
                    matches!(result, Err(Error::PrivateMemory { gpa, .. }) if gpa == first),
                    "{result:?}"
                );
            }
            None => {
                result.unwrap();
                for (at, byte) in (at..).zip(data) {
                    if let Some(bytes) = &mut self.bytes[(at / PAGE_SIZE) as usize] {
                        bytes[(at % PAGE_SIZE) as usize] = byte;
                    }
                }
            }
        }
    }

    pub fn read(&self, machine: &Machine, at: u64, len: u64) {
        let mut data = vec![0xcc; len as usize];
        let result = machine.read(at, &mut data);
        match self.first_private(at, len) {
            Some(first) => {
                assert!(
                    matches!(result, Err(Error::PrivateMemory { gpa, .. }) if gpa == first),
                    "{result:?}"
                );
                assert!(
                    data.iter().all(|byte| *byte == 0xcc),
                    "bytes of a private page came out"
                );
            }
            None => {
                result.unwrap();
                let mut at = at;
                while !data.is_empty() {
                    let start = (at % PAGE_SIZE) as usize;
                    let rest = data.split_off(data.len().min(PAGE_SIZE as usize - start));
                    if let Some(bytes) = &self.bytes[(at / PAGE_SIZE) as usize] {
                        assert!(data == bytes[start..start + data.len()], "wrong bytes at {at:#x}");
                    }
                    at += data.len() as u64;
                    data = rest;
                }
            }
        }
    }

    pub fn check(&self, fake: &FakeVm, machine: &Machine) {
        assert_eq!(states(machine), self.states);
        let snapshot = machine.memory().snapshot();
        assert_eq!(machine.memory().generation(), self.generation);
        let private = self.states.iter().filter(|state| **state == State::Private).count() as u64;
        assert_eq!(snapshot.private_bytes(), private * PAGE_SIZE);
        if !self.broken {
            self.setup.check_told(fake, &self.states);
        }
        for run in snapshot.runs().filter(|run| run.state == State::Shared) {
            self.read(machine, run.range.gpa(), run.range.size());
        }
    }
}
