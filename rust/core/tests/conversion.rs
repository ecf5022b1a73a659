//! Conversions by the host, over each way of enforcement, against a list of pages: what the map says, what KVM was
//! told, and which bytes are there.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::time::Duration;

use pagegate_core::error::{ConvertError, Error};
use pagegate_core::hypervisor::fake::{CallName, FakeVm, Injection};
use pagegate_core::hypervisor::host::EnforcementMode;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::Config;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::memory::conversion::Converted;
use pagegate_core::policy::simple::Allow;
use proptest::collection::vec;
use proptest::prelude::*;

const BIT: u32 = 40;
const ALL_CALLS: [CallName; 4] = [
    CallName::SetAttributes,
    CallName::CreateMemslot,
    CallName::DeleteMemslot,
    CallName::Discard,
];

#[derive(Clone, Copy, Debug)]
struct Setup {
    mode: EnforcementMode,
    split: bool,
    pages: u64,
    parts: u32,
    memslots: u32,
    vcpus: u32,
    initial: State,
}

impl Setup {
    fn machine(&self) -> (Arc<FakeVm>, Machine) {
        let limits = match self.mode {
            EnforcementMode::Attributes => FakeVm::protected(self.memslots),
            EnforcementMode::Memslots => FakeVm::plain(self.memslots),
        };
        let fake = Arc::new(FakeVm::new(limits, Vec::new(), 1));
        let config = Config {
            memory: self.pages * PAGE_SIZE,
            vcpus: self.vcpus,
            vm_type: None,
            enforcement: Some(self.mode),
            shared_bit: self.split.then_some(BIT),
            initial: self.initial,
            events: 16,
            memslots: self.parts,
            policy: Arc::new(Allow),
            around: None,
            hypervisor: Some(fake.clone()),
        };
        (fake, Machine::new(config).unwrap())
    }

    /// What KVM has to be told of a page in `state`: for each view its address, its slot (and whether a guest_memfd
    /// is behind it), and whether it carries PRIVATE.
    fn told(&self, gpa: u64, state: State) -> Vec<(u64, Option<bool>, bool)> {
        let private = state == State::Private;
        let shared_view = gpa | 1 << BIT;
        match (self.mode, self.split) {
            (EnforcementMode::Attributes, false) => vec![(gpa, Some(true), private)],
            (EnforcementMode::Attributes, true) => vec![
                (gpa, private.then_some(true), true),
                (shared_view, Some(false), private),
            ],
            (EnforcementMode::Memslots, false) => vec![(gpa, Some(private), false)],
            (EnforcementMode::Memslots, true) => vec![
                (gpa, private.then_some(true), false),
                (shared_view, (!private).then_some(false), false),
            ],
        }
    }

    /// How many slots these states need, each as large as it can be.
    fn slots(&self, states: &[State]) -> usize {
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
            (EnforcementMode::Memslots, _) => private + shared,
        }
    }

    fn check_told(&self, fake: &FakeVm, states: &[State]) {
        for (page, state) in states.iter().enumerate() {
            let gpa = page as u64 * PAGE_SIZE;
            for (at, slot, private) in self.told(gpa, *state) {
                assert_eq!(fake.slot_at(at), slot, "the slot at {at:#x} of a {state} page");
                assert_eq!(fake.is_private(at), private, "PRIVATE at {at:#x} of a {state} page");
            }
        }
        assert_eq!(fake.slot_count(), self.slots(states));
    }
}

fn states(machine: &Machine) -> Vec<State> {
    let snapshot = machine.memory().snapshot();
    let pages = 0..snapshot.size() / PAGE_SIZE;
    pages.map(|page| snapshot.state(page * PAGE_SIZE)).collect()
}

fn pages(first: u64, count: u64) -> Range {
    Range::new(first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
}

// ---- one at a time

#[derive(Clone, Debug)]
enum Op {
    Convert {
        range: Range,
        /// Whether the start is named by its shared view.
        by_shared_view: bool,
        to: State,
        /// Whether the stale side is left as it is.
        keep: bool,
        injection: Option<Injection>,
    },
    Write {
        at: u64,
        len: u64,
        byte: u8,
    },
    Read {
        at: u64,
        len: u64,
    },
}

fn injections() -> impl Strategy<Value = Injection> {
    let errno = prop::sample::select(vec![libc::ENOMEM, libc::EINVAL, libc::EAGAIN, libc::EIO]);
    let after = prop_oneof![3 => Just(0_u64), 2 => 1..4_u64];
    (
        prop::sample::select(&ALL_CALLS[..]),
        after,
        errno,
        any::<bool>(),
        prop::bool::weighted(0.15),
    )
        .prop_map(|(call, after, errno, half_done, forever)| Injection {
            call,
            after,
            errno,
            half_done,
            forever,
        })
}

fn ranges(memory: u64) -> impl Strategy<Value = Range> {
    (0..memory).prop_flat_map(move |first| {
        let longest = memory - first;
        let count = prop_oneof![3 => 1..=longest.min(5), 2 => 1..=longest, 1 => Just(longest)];
        count.prop_map(move |count| pages(first, count))
    })
}

fn sides() -> impl Strategy<Value = State> {
    prop::sample::select(vec![State::Private, State::Shared])
}

fn ops(memory: u64) -> impl Strategy<Value = Op> {
    let bytes = move || (0..memory * PAGE_SIZE, 1..4 * PAGE_SIZE);
    let convert = (
        ranges(memory),
        any::<bool>(),
        sides(),
        prop::bool::weighted(0.2),
        prop::option::weighted(0.3, injections()),
    );
    prop_oneof![
        5 => convert.prop_map(|(range, by_shared_view, to, keep, injection)| {
            Op::Convert { range, by_shared_view, to, keep, injection }
        }),
        3 => (bytes(), 1..=255_u8).prop_map(|((at, len), byte)| Op::Write { at, len, byte }),
        2 => bytes().prop_map(|(at, len)| Op::Read { at, len }),
    ]
}

fn setups() -> impl Strategy<Value = Setup> {
    let mode = prop::sample::select(vec![EnforcementMode::Attributes, EnforcementMode::Memslots]);
    // The larger ones need more than one call for their attributes.
    let pages = prop_oneof![9 => 3..40_u64, 1 => 500..700_u64];
    let room = prop_oneof![2 => 6..14_u32, 3 => Just(5000_u32)];
    (mode, any::<bool>(), pages, 1..=3_u32, room, 1..=2_u32, sides()).prop_map(
        |(mode, split, pages, parts, memslots, vcpus, initial)| Setup {
            mode,
            split,
            pages,
            parts,
            memslots,
            vcpus,
            initial,
        },
    )
}

/// Everything there is to know, page by page.
struct Model {
    setup: Setup,
    states: Vec<State>,
    /// The shared side; `None` where freeing it failed and old bytes may come back.
    bytes: Vec<Option<Vec<u8>>>,
    generation: u64,
    /// Calls that will fail: their numbers.
    pending: Vec<Injection>,
    /// What KVM enforces is unknown.
    broken: bool,
}

impl Model {
    fn new(setup: Setup) -> Self {
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

    /// The injected failures that calls `before..after` ran into, for each call.
    fn failures(&self, before: &Calls, after: &Calls) -> Vec<Injection> {
        let hit = |injection: &&Injection| {
            let (from, to) = (before[&injection.call], after[&injection.call]);
            let last = if injection.forever { u64::MAX } else { injection.after };
            injection.after < to && from <= last && from < to
        };
        self.pending.iter().filter(hit).copied().collect()
    }

    fn convert(&mut self, fake: &FakeVm, machine: &Machine, range: Range, at: u64, (to, keep): (State, bool)) {
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
            assert_eq!(before, after, "a machine that is broken called KVM");
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
            Err(ConvertError::Discard { gpa, size, errno }) => {
                assert!(discard_failed && errnos.contains(&errno.0));
                assert_eq!((gpa, size), (range.gpa(), range.size()));
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
                // What KVM's emulation left on the shared side goes before anything changes.
                let cleaned = to == State::Shared && self.setup.mode == EnforcementMode::Attributes;
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

    /// `discarded` is whether the stale side was freed, `None` where it was to be kept.
    fn take_over(&mut self, states: Vec<State>, range: Range, to: State, discarded: Option<bool>) {
        let span = (range.gpa() / PAGE_SIZE) as usize..(range.end() / PAGE_SIZE) as usize;
        for page in span.filter(|_| to == State::Private) {
            let bytes = &mut self.bytes[page];
            match (discarded, self.states[page]) {
                (None, _) => {}
                (Some(true), State::Shared) => *bytes = Some(vec![0; PAGE_SIZE as usize]),
                (Some(false), State::Shared) => *bytes = None,
                // Kept earlier; whether a conversion that does not change the page frees it is not said.
                (Some(_), State::Private) => drop(bytes.take_if(|bytes| bytes.iter().any(|byte| *byte != 0))),
            }
        }
        self.states = states;
        self.generation += 1;
    }

    fn write(&mut self, machine: &Machine, at: u64, len: u64, byte: u8) {
        // Each byte says where it was meant to be.
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

    fn read(&self, machine: &Machine, at: u64, len: u64) {
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

    fn check(&self, fake: &FakeVm, machine: &Machine) {
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

type Calls = BTreeMap<CallName, u64>;

fn calls(fake: &FakeVm) -> Calls {
    ALL_CALLS.iter().map(|call| (*call, fake.calls(*call))).collect()
}

fn setups_and_ops() -> impl Strategy<Value = (Setup, Vec<Op>)> {
    setups().prop_flat_map(|setup| (Just(setup), vec(ops(setup.pages), 1..25)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    #[test]
    fn like_a_list_of_pages((setup, ops) in setups_and_ops()) {
        let (fake, machine) = setup.machine();
        let mut model = Model::new(setup);
        model.check(&fake, &machine);
        for op in ops {
            match op {
                Op::Convert { range, by_shared_view, to, keep, injection } => {
                    if let Some(injection) = injection {
                        fake.inject(injection);
                        let after = injection.after + fake.calls(injection.call);
                        model.pending.push(Injection { after, ..injection });
                    }
                    let bit = u64::from(by_shared_view && setup.split) << BIT;
                    model.convert(&fake, &machine, range, range.gpa() | bit, (to, keep));
                }
                Op::Write { at, len, byte } => {
                    let len = len.min(setup.pages * PAGE_SIZE - at);
                    model.write(&machine, at, len, byte);
                }
                Op::Read { at, len } => model.read(&machine, at, len.min(setup.pages * PAGE_SIZE - at)),
            }
            model.check(&fake, &machine);
        }
    }
}

fn every_setup() -> Vec<Setup> {
    let mut setups = Vec::new();
    for mode in [EnforcementMode::Attributes, EnforcementMode::Memslots] {
        for split in [false, true] {
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

fn error(result: Result<Converted, Error>) -> ConvertError {
    match result {
        Err(Error::HostConversion(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn there_and_back_reads_as_zeroes() {
    for setup in every_setup() {
        let (_, machine) = setup.machine();
        machine.convert(0, 0x8000, State::Shared).unwrap();
        machine.write(0x2ff0, &[7; 0x2020]).unwrap();
        machine.convert(0x3000, 0x1000, State::Private).unwrap();
        assert!(matches!(
            machine.read(0x2ff0, &mut [0; 0x20]),
            Err(Error::PrivateMemory { gpa: 0x3000, .. })
        ));
        machine.convert(0x2000, 0x4000, State::Shared).unwrap();
        let mut bytes = vec![1; 0x2020];
        machine.read(0x2ff0, &mut bytes).unwrap();
        assert!(
            bytes[..0x10].iter().all(|byte| *byte == 7),
            "{setup:?}: the page before changed"
        );
        assert!(
            bytes[0x10..0x1010].iter().all(|byte| *byte == 0),
            "{setup:?}: old bytes came back"
        );
        assert!(
            bytes[0x1010..].iter().all(|byte| *byte == 7),
            "{setup:?}: the page behind changed"
        );
    }
}

#[test]
fn kept_bytes_come_back() {
    for setup in every_setup() {
        let (fake, machine) = setup.machine();
        machine.convert(0, 0x8000, State::Shared).unwrap();
        machine.write(0x2ff0, &[7; 0x2020]).unwrap();
        let discards = fake.calls(CallName::Discard);
        machine.memory().convert(0x2000, 0x3000, State::Private, true).unwrap();
        let mut bytes = vec![1; 0x2020];
        assert!(matches!(
            machine.read(0x2ff0, &mut bytes),
            Err(Error::PrivateMemory { gpa: 0x2000, .. })
        ));
        machine.memory().convert(0, 0x8000, State::Shared, true).unwrap();
        machine.read(0x2ff0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 0x2020]);
        assert_eq!(fake.calls(CallName::Discard), discards);
    }
}

#[test]
fn ranges_outside_memory_are_refused() {
    for setup in every_setup() {
        let (fake, machine) = setup.machine();
        let before = calls(&fake);
        let memory = setup.pages * PAGE_SIZE;
        let mut ranges = vec![
            (0, 0),
            (0x1000, 0x800),
            (0x800, 0x1000),
            (0, memory + PAGE_SIZE),
            (memory, PAGE_SIZE),
            (memory - PAGE_SIZE, 2 * PAGE_SIZE),
            (u64::MAX - 0xfff, 0x2000),
            (0, u64::MAX - 0xfff),
            (1 << 41, PAGE_SIZE),
        ];
        if !setup.split {
            ranges.push((1 << BIT, PAGE_SIZE));
        }
        for (gpa, size) in ranges {
            let refused = error(machine.convert(gpa, size, setup.initial.other()));
            let says = format!(
                "range {gpa:#x} + {size:#x} is not a page-aligned, non-empty part of the guest's {memory:#x} bytes"
            );
            assert_eq!(refused.to_string(), says);
        }
        assert_eq!(calls(&fake), before);
        assert_eq!(machine.memory().generation(), 0);
    }
}

#[test]
fn each_call_that_fails_is_undone() {
    for setup in every_setup() {
        // Three runs, so that there is something to merge and something to split.
        let prepared = || {
            let (fake, machine) = setup.machine();
            machine.convert(0x8000, 0x4000, setup.initial.other()).unwrap();
            machine.convert(0x1e000, 0x4000, setup.initial.other()).unwrap();
            (fake, machine)
        };
        for to in [State::Private, State::Shared] {
            let (fake, machine) = prepared();
            let before = calls(&fake);
            machine.convert(0x4000, 0x20000, to).unwrap();
            let made = calls(&fake);
            for call in ALL_CALLS {
                for after in 0..made[&call] - before[&call] {
                    for half_done in [false, true] {
                        let (fake, machine) = prepared();
                        fake.inject(Injection {
                            call,
                            after,
                            errno: libc::ENOMEM,
                            half_done,
                            forever: false,
                        });
                        let (old, generation) = (states(&machine), machine.memory().generation());
                        let failed = error(machine.convert(0x4000, 0x20000, to));
                        if call == CallName::Discard {
                            assert!(matches!(failed, ConvertError::Discard { .. }), "{failed:?}");
                            assert_eq!(machine.memory().generation(), generation + 1);
                        } else {
                            assert!(matches!(failed, ConvertError::Undone { .. }), "{failed:?}");
                            assert_eq!(failed.guest_errno().unwrap().0, libc::ENOMEM);
                            assert_eq!(states(&machine), old);
                            assert_eq!(machine.memory().generation(), generation);
                        }
                        setup.check_told(&fake, &states(&machine));
                        // And it can be done later.
                        machine.convert(0x4000, 0x20000, to.other()).unwrap();
                        machine.convert(0x4000, 0x20000, to).unwrap();
                        setup.check_told(&fake, &states(&machine));
                    }
                }
            }
        }
    }
}

#[test]
fn a_failure_that_cannot_be_undone_blocks_what_comes_later() {
    for setup in every_setup() {
        let (fake, machine) = setup.machine();
        machine.convert(0x8000, 0x4000, setup.initial.other()).unwrap();
        let call = match setup.mode {
            EnforcementMode::Attributes => CallName::SetAttributes,
            EnforcementMode::Memslots => CallName::CreateMemslot,
        };
        fake.inject(Injection {
            call,
            after: 0,
            errno: libc::ENOMEM,
            half_done: true,
            forever: true,
        });
        let old = states(&machine);
        let failed = error(machine.convert(0x4000, 0x10000, setup.initial.other()));
        assert!(
            matches!(failed, ConvertError::Inconsistent { .. }),
            "{setup:?}: {failed:?}"
        );
        assert_eq!(failed.guest_errno(), None);
        let made = calls(&fake);
        let blocked = error(machine.convert(0x30000, 0x1000, setup.initial.other()));
        assert!(
            matches!(blocked, ConvertError::Inconsistent { .. }),
            "{setup:?}: {blocked:?}"
        );
        // Nor does it claim that anything is as it should be.
        let claimed = error(machine.convert(0x30000, 0x1000, setup.initial));
        assert!(
            matches!(claimed, ConvertError::Inconsistent { .. }),
            "{setup:?}: {claimed:?}"
        );
        assert_eq!(calls(&fake), made);
        assert_eq!(states(&machine), old);
    }
}

#[test]
fn too_few_slots_are_noticed_before_kvm_is_asked() {
    for split in [false, true] {
        for mode in [EnforcementMode::Memslots, EnforcementMode::Attributes] {
            let setup = Setup {
                mode,
                split,
                pages: 64,
                parts: 1,
                memslots: 4,
                vcpus: 1,
                initial: State::Shared,
            };
            if mode == EnforcementMode::Attributes && !split {
                // One slot does for whatever the attributes say.
                let (fake, machine) = setup.machine();
                for page in (0..64).step_by(2) {
                    machine.convert(page * PAGE_SIZE, PAGE_SIZE, State::Private).unwrap();
                }
                setup.check_told(&fake, &states(&machine));
                continue;
            }
            let (fake, machine) = setup.machine();
            let mut refused = None;
            for page in (1..63).step_by(2) {
                let made = calls(&fake);
                match machine.convert(page * PAGE_SIZE, PAGE_SIZE, State::Private) {
                    Ok(_) => assert_eq!(refused, None),
                    Err(Error::HostConversion(error @ ConvertError::NoSlots { .. })) => {
                        assert_eq!(error.guest_errno().unwrap().0, libc::ENOSPC);
                        refused.get_or_insert(page);
                        let slot_calls =
                            |calls: &Calls| (calls[&CallName::CreateMemslot], calls[&CallName::DeleteMemslot]);
                        assert_eq!(slot_calls(&calls(&fake)), slot_calls(&made));
                    }
                    other => panic!("{other:?}"),
                }
                setup.check_told(&fake, &states(&machine));
            }
            assert!(refused.is_some());
        }
    }
}

// ---- several at once

/// Fails if `body` hangs.
fn within_patience(body: impl FnOnce() + Send + 'static) {
    const PATIENCE: Duration = Duration::from_secs(40);
    let (done, finished) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        body();
        done.send(()).unwrap();
    });
    match finished.recv_timeout(PATIENCE) {
        Ok(()) => thread.join().unwrap(),
        Err(mpsc::RecvTimeoutError::Disconnected) => std::panic::resume_unwind(thread.join().unwrap_err()),
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("conversions wait for each other"),
    }
}

/// Numbers without a pattern that matters.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Says that it is over, however it ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Batches of opposite conversions of a few pages; after each, KVM must have been told what the map says.
fn fight(setup: Setup, threads: u64, batches: u64) {
    let (fake, machine) = setup.machine();
    let over = AtomicBool::new(false);
    let machine = &machine;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut last = 0;
            while !over.load(Ordering::SeqCst) {
                let snapshot = machine.memory().snapshot();
                assert!(snapshot.generation() >= last, "the generation went back");
                last = snapshot.generation();
                let private = snapshot.runs().filter(|run| run.state == State::Private);
                let sum: u64 = private.map(|run| run.range.size()).sum();
                assert_eq!(sum, snapshot.private_bytes(), "a snapshot shows half a conversion");
                let mut bytes = [0; 8];
                match machine.read(5 * PAGE_SIZE, &mut bytes) {
                    Ok(()) | Err(Error::PrivateMemory { gpa: 0x5000, .. }) => {}
                    other => panic!("{other:?}"),
                }
                std::thread::yield_now();
            }
        });
        let ended = Over(&over);
        for batch in 0..batches {
            let start = Barrier::new(threads as usize);
            std::thread::scope(|scope| {
                for thread in 0..threads {
                    let start = &start;
                    scope.spawn(move || {
                        let to = if thread % 2 == 0 { State::Private } else { State::Shared };
                        let mut random = Random(1 + batch * threads + thread);
                        start.wait();
                        for _ in 0..4 {
                            let first = random.below(6);
                            let size = (1 + random.below(3)) * PAGE_SIZE;
                            let done = machine.memory().convert(first * PAGE_SIZE, size, to, false);
                            assert!(
                                matches!(done, Ok(Converted::Done { changed }) if changed <= size),
                                "{done:?}"
                            );
                        }
                    });
                }
            });
            setup.check_told(&fake, &states(machine));
        }
        drop(ended);
        reader.join().unwrap();
    });
}

#[test]
fn opposite_conversions_of_overlapping_ranges_agree_in_the_end() {
    for setup in every_setup() {
        for (threads, vcpus) in [(2, 1), (4, 2)] {
            let setup = Setup {
                vcpus,
                pages: 8,
                ..setup
            };
            within_patience(move || fight(setup, threads, 100));
        }
    }
}

/// A store by the host either precedes a conversion, and is gone with it, or meets a private page.
#[test]
fn a_store_does_not_slip_into_a_page_that_becomes_private() {
    for setup in every_setup().into_iter().step_by(3) {
        within_patience(move || {
            let (_, machine) = setup.machine();
            let over = AtomicBool::new(false);
            machine.convert(0, 0x4000, State::Shared).unwrap();
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        while !over.load(Ordering::SeqCst) {
                            match machine.write(0x1ff8, &[7; 16]) {
                                Ok(()) | Err(Error::PrivateMemory { gpa: 0x1000, .. }) => {}
                                other => panic!("{other:?}"),
                            }
                        }
                    });
                }
                let _ended = Over(&over);
                for _ in 0..300 {
                    machine.convert(0x1000, 0x2000, State::Private).unwrap();
                    // Nothing else of the shared side was ever written.
                    let shared = match machine.resident() {
                        Ok(resident) => resident.shared,
                        Err(Error::NotSupported(_)) => 0,
                        other => panic!("{other:?}"),
                    };
                    assert_eq!(shared, 0, "a private page has bytes on the shared side");
                    machine.convert(0x1000, 0x2000, State::Shared).unwrap();
                    std::thread::yield_now();
                }
            });
        });
    }
}

#[test]
fn disjoint_conversions_at_once_count_every_byte() {
    for setup in every_setup() {
        within_patience(move || {
            let (fake, machine) = setup.machine();
            let machine = &machine;
            let sums: Vec<u64> = std::thread::scope(|scope| {
                let workers = (0..4).map(|thread| {
                    scope.spawn(move || {
                        let mut sum = 0;
                        for round in 0..100_u64 {
                            let to = if round % 2 == 0 {
                                setup.initial.other()
                            } else {
                                setup.initial
                            };
                            let gpa = thread * 16 * PAGE_SIZE;
                            match machine.memory().convert(gpa, 16 * PAGE_SIZE, to, false).unwrap() {
                                Converted::Done { changed } => sum += changed,
                                Converted::Superseded | Converted::Interrupted { .. } => panic!("nobody else was here"),
                            }
                        }
                        sum
                    })
                });
                let workers: Vec<_> = workers.collect();
                workers.into_iter().map(|worker| worker.join().unwrap()).collect()
            });
            assert_eq!(sums, [100 * 16 * PAGE_SIZE; 4]);
            assert_eq!(machine.memory().generation(), 400);
            setup.check_told(&fake, &states(machine));
        });
    }
}
