//! Whole runs of scripted guests: what the policy is asked, what the guest is answered, what is recorded.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use pagegate_core::boot::start::CpuMode;
use pagegate_core::devices::bus::{IoHandler, MmioHandler};
use pagegate_core::errno::Errno;
use pagegate_core::error::{ConvertError, Error, Failure};
use pagegate_core::events::event::{Event, Kind, Outcome};
use pagegate_core::hypervisor::exit::{Io, Mmio};
use pagegate_core::hypervisor::fake::{CallName, FakeVm, Injection, Reply, Step};
use pagegate_core::hypervisor::host::EnforcementMode;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::Config;
use pagegate_core::machine::report::Report;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::policy::decision::{Convert, Decision};
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::request::{ExplicitRequest, ImplicitRequest};
use pagegate_core::vcpu::running::LIVELOCK_BOUND;
use parking_lot::Mutex;

const BIT: u32 = 40;
const PAGES: u64 = 64;
const PRIVATE_FLAG: u64 = 1 << 3;
const EXIT_MEMORY_FAULT: u32 = 39;
const TO_SHARED: u64 = 0;
const TO_PRIVATE: u64 = 0x10;

type Hook<Request> = Box<dyn Fn(&Request) -> Result<Decision, Failure> + Send + Sync>;

/// A policy that writes down what it was asked and answers as told; asked as often as it says.
struct Judge {
    fault: Hook<ImplicitRequest>,
    call: Hook<ExplicitRequest>,
    poison: Hook<ImplicitRequest>,
    faults: Mutex<Vec<ImplicitRequest>>,
    calls: Mutex<Vec<ExplicitRequest>>,
    poisons: Mutex<Vec<ImplicitRequest>>,
}

impl Judge {
    fn allow() -> Self {
        Self {
            fault: Box::new(|_| Ok(Decision::as_asked())),
            call: Box::new(|_| Ok(Decision::as_asked())),
            poison: Box::new(|_| Ok(Decision::Stop("poison".to_owned()))),
            faults: Mutex::default(),
            calls: Mutex::default(),
            poisons: Mutex::default(),
        }
    }

    fn faults(answer: impl Fn(&ImplicitRequest) -> Result<Decision, Failure> + Send + Sync + 'static) -> Self {
        Self {
            fault: Box::new(answer),
            ..Self::allow()
        }
    }

    fn calls(answer: impl Fn(&ExplicitRequest) -> Result<Decision, Failure> + Send + Sync + 'static) -> Self {
        Self {
            call: Box::new(answer),
            ..Self::allow()
        }
    }

    fn poisons(answer: impl Fn(&ImplicitRequest) -> Result<Decision, Failure> + Send + Sync + 'static) -> Self {
        Self {
            poison: Box::new(answer),
            ..Self::allow()
        }
    }
}

impl Policy for Judge {
    fn memory_fault(&self, fault: &ImplicitRequest) -> Result<Decision, Failure> {
        self.faults.lock().push(*fault);
        (self.fault)(fault)
    }

    fn map_gpa_range(&self, call: &ExplicitRequest) -> Result<Decision, Failure> {
        self.calls.lock().push(*call);
        (self.call)(call)
    }

    fn memory_poison(&self, poison: &ImplicitRequest) -> Result<Decision, Failure> {
        self.poisons.lock().push(*poison);
        (self.poison)(poison)
    }
}

/// Answers once with the first decision, then as asked.
fn once<Request>(first: Result<Decision, &'static str>) -> impl Fn(&Request) -> Result<Decision, Failure> {
    let asked = AtomicBool::new(false);
    move |_| match asked.swap(true, Ordering::SeqCst) {
        false => Ok(first.clone()?),
        true => Ok(Decision::as_asked()),
    }
}

struct Guest {
    fake: Arc<FakeVm>,
    machine: Arc<Machine>,
    judge: Arc<Judge>,
}

#[derive(Clone)]
struct Setup {
    mode: EnforcementMode,
    split: bool,
    initial: State,
    events: usize,
    cycles: u64,
    memslots: u32,
    spare_vcpus: u32,
}

const PLAIN: Setup = Setup {
    mode: EnforcementMode::Attributes,
    split: false,
    initial: State::Shared,
    events: 1000,
    cycles: 1,
    memslots: 512,
    spare_vcpus: 0,
};
const SPLIT: Setup = Setup { split: true, ..PLAIN };
const MEMSLOTS: Setup = Setup {
    mode: EnforcementMode::Memslots,
    ..SPLIT
};

impl Setup {
    fn guest(self, scripts: Vec<Vec<Step>>, judge: Judge) -> Guest {
        let limits = match self.mode {
            EnforcementMode::Attributes => FakeVm::protected(self.memslots),
            EnforcementMode::Memslots => FakeVm::plain(self.memslots),
        };
        let vcpus = scripts.len() as u32 + self.spare_vcpus;
        let fake = Arc::new(FakeVm::new(limits, scripts, self.cycles));
        let judge = Arc::new(judge);
        let config = Config {
            memory: PAGES * PAGE_SIZE,
            vcpus,
            vm_type: None,
            enforcement: Some(self.mode),
            shared_bit: self.split.then_some(BIT),
            initial: self.initial,
            events: self.events,
            memslots: 1,
            policy: judge.clone(),
            around: None,
            hypervisor: Some(fake.clone()),
        };
        let guest = Guest {
            fake,
            machine: Arc::new(Machine::new(config).unwrap()),
            judge,
        };
        for vcpu in 0..vcpus {
            guest.start(vcpu as usize);
        }
        guest
    }
}

impl Guest {
    fn start(&self, vcpu: usize) {
        let mode = match self.machine.memory().views().split() {
            // Real mode does not reach the shared views.
            true => CpuMode::Long,
            false => CpuMode::Real,
        };
        self.machine.start(vcpu, mode, &[]).unwrap();
    }

    fn try_run(&self) -> Result<Report, Error> {
        self.machine.run(Some(Duration::from_secs(20)), &mut || Ok(()))
    }

    fn run(&self) -> Report {
        self.try_run().unwrap()
    }

    fn until_running(&self) {
        let begun = Instant::now();
        while !self.machine.running() {
            assert!(begun.elapsed() < Duration::from_secs(10), "the run does not begin");
            std::thread::yield_now();
        }
    }

    fn events(&self) -> Vec<Event> {
        self.machine.events().since(0)
    }

    fn outcomes(&self) -> Vec<Outcome> {
        self.events().iter().map(|event| event.outcome).collect()
    }

    fn state(&self, gpa: u64) -> State {
        self.machine.memory().snapshot().state(gpa)
    }

    /// What requests were answered: the step, and RAX as a signed number.
    fn answers(&self, vcpu: usize) -> Vec<(usize, i64)> {
        let answer = |reply: Reply| (reply.step, i64::from_le_bytes(reply.value.try_into().unwrap()));
        self.fake.replies(vcpu).into_iter().map(answer).collect()
    }

    /// That KVM was told what the map says, for each page and view.
    fn agrees(&self, setup: &Setup) {
        for page in 0..PAGES {
            let gpa = page * PAGE_SIZE;
            let private = self.state(gpa) == State::Private;
            let told = |gpa| (self.fake.slot_at(gpa), self.fake.is_private(gpa));
            match (setup.mode, setup.split) {
                (EnforcementMode::Attributes, false) => assert_eq!(told(gpa), (Some(true), private)),
                (EnforcementMode::Attributes, true) => {
                    assert_eq!(told(gpa), (private.then_some(true), true));
                    assert_eq!(told(gpa | 1 << BIT), (Some(false), private));
                }
                (EnforcementMode::Memslots, false) => assert_eq!(told(gpa), (Some(private), false)),
                (EnforcementMode::Memslots, true) => {
                    assert_eq!(told(gpa), (private.then_some(true), false));
                    assert_eq!(told(gpa | 1 << BIT), ((!private).then_some(false), false));
                }
            }
        }
    }
}

fn private_view(gpa: u64, write: bool) -> Step {
    Step::Access { gpa, write }
}

fn shared_view(gpa: u64, write: bool) -> Step {
    let gpa = gpa | 1 << BIT;
    Step::Access { gpa, write }
}

fn map_gpa_range(gpa: u64, pages: u64, attributes: u64) -> Step {
    Step::Hypercall([12, gpa, pages, attributes])
}

/// A memory fault as KVM reports it; the script goes on behind it.
fn memory_fault(flags: u64, gpa: u64) -> Step {
    Step::Exit {
        errno: libc::EFAULT,
        reason: EXIT_MEMORY_FAULT,
        words: [flags, gpa, PAGE_SIZE],
    }
}

fn poison(gpa: u64) -> Step {
    Step::Exit {
        errno: libc::EHWPOISON,
        reason: EXIT_MEMORY_FAULT,
        words: [PRIVATE_FLAG, gpa, PAGE_SIZE],
    }
}

fn convert_to(to: State) -> Decision {
    Decision::Convert(Convert {
        to: Some(to),
        ..Default::default()
    })
}

fn convert_at(gpa: u64, size: u64) -> Decision {
    Decision::Convert(Convert {
        gpa: Some(gpa),
        size: Some(size),
        ..Default::default()
    })
}

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
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("the run does not end"),
    }
}

// ---- implicit requests

#[test]
fn an_access_through_the_other_view_is_a_request_in_both_directions() {
    for setup in [SPLIT, MEMSLOTS] {
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
            // With attributes either view is out of reach by being private.
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
fn stores_and_loads_without_a_slot_reach_the_right_side() {
    let stored = 0x1122_3344_5566_7788_u64;
    // The store goes to the shared side, where the host finds it.
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
        Step::Io {
            port: 0x10,
            write: true,
            size: 1,
            data: vec![0],
        },
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

/// Port IO that does something with the machine.
struct Handler<F> {
    machine: Late,
    act: F,
}

#[derive(Default)]
struct Late(Mutex<Option<std::sync::Weak<Machine>>>);

impl Late {
    fn set(&self, guest: &Guest) {
        *self.0.lock() = Some(Arc::downgrade(&guest.machine));
    }

    fn get(&self) -> Arc<Machine> {
        self.0.lock().as_ref().unwrap().upgrade().unwrap()
    }
}

impl<F: Fn(&Machine) -> Result<(), Failure> + Send + Sync> IoHandler for Handler<F> {
    fn io(&self, _: u32, io: &Io, data: &mut [u8]) -> Result<(), Failure> {
        assert_eq!(data.len(), io.len());
        (self.act)(&self.machine.get())?;
        if !io.write {
            data.fill(0x5a);
        }
        Ok(())
    }
}

fn handler<F: Fn(&Machine) -> Result<(), Failure> + Send + Sync>(act: F) -> Arc<Handler<F>> {
    Arc::new(Handler {
        machine: Late::default(),
        act,
    })
}

#[test]
fn a_denied_access_ends_the_run_and_is_asked_again_by_the_next() {
    for setup in [SPLIT, MEMSLOTS] {
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
    for setup in [SPLIT, MEMSLOTS] {
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
    for setup in [SPLIT, MEMSLOTS] {
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
fn a_fault_that_no_conversion_can_cure_is_a_livelock_error() {
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
fn stopping_gives_the_policys_own_reason() {
    for setup in [SPLIT, MEMSLOTS] {
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
fn a_wider_conversion_is_recorded_as_done() {
    for setup in [SPLIT, MEMSLOTS] {
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
fn a_policy_that_was_overtaken_changes_nothing() {
    // The hook does by itself what it was asked about.
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

#[test]
fn pages_that_changed_while_the_policy_thought_are_judged_anew_unless_nothing_is_news() {
    // What the hook does to the two pages by itself, in which state they are judged then, and what is left to be changed.
    type Case = (&'static [(u64, State)], Option<State>, u64);
    let steps: [Case; 4] = [
        (&[(2, State::Private)], Some(State::Shared), 0),
        (&[(1, State::Private)], None, PAGE_SIZE),
        (
            &[(2, State::Private), (2, State::Shared)],
            Some(State::Shared),
            2 * PAGE_SIZE,
        ),
        (&[(2, State::Private), (1, State::Shared)], None, PAGE_SIZE),
    ];
    for setup in [PLAIN, SPLIT, MEMSLOTS] {
        for (itself, state, left) in steps {
            let late = Arc::new(Late::default());
            let inner = late.clone();
            let judge = Judge::calls(move |call| {
                for (pages, to) in itself {
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
            assert_eq!((events[0].state, events[0].changed, events[0].errno), (state, left, 0));
            assert_eq!(guest.judge.calls.lock().len(), if state.is_none() { 2 } else { 1 });
            assert_eq!(
                [0x5000, 0x6000].map(|gpa| guest.state(gpa)),
                [State::Private, State::Private]
            );
            guest.agrees(&setup);
        }
    }
}

/// With one view, KVM reports what the page was when it looked.
#[test]
fn a_fault_that_is_out_of_date_does_not_undo_a_conversion() {
    for attempt in 0..6_u32 {
        // Inside KVM_RUN long enough for a conversion to happen meanwhile.
        let mut script = vec![Step::Io {
            port: 0x10,
            write: true,
            size: 1,
            data: vec![0],
        }];
        script.extend(vec![private_view(0x1000, false); 100_000 << attempt.min(3)]);
        script.push(memory_fault(0, 0x5000));
        let guest = PLAIN.guest(vec![script], Judge::allow());
        let (entered, enters) = mpsc::channel();
        let entered = Mutex::new(entered);
        let tell = handler(move |_| Ok(entered.lock().send(())?));
        tell.machine.set(&guest);
        guest.machine.on_io(0x10, tell).unwrap();
        let report = std::thread::scope(|scope| {
            let machine = &guest.machine;
            scope.spawn(move || {
                enters.recv().unwrap();
                std::thread::sleep(Duration::from_millis(10));
                machine.convert(0x5000, PAGE_SIZE, State::Private).unwrap();
            });
            guest.run()
        });
        assert!(
            guest.judge.faults.lock().is_empty(),
            "the policy was asked about an old state"
        );
        assert_eq!(guest.state(0x5000), State::Private, "a conversion was undone");
        if report.tally.stale == 1 {
            return;
        }
    }
    panic!("no conversion happened inside KVM_RUN");
}

#[test]
fn code_in_the_other_view_is_a_request() {
    let guest = SPLIT.guest(vec![vec![Step::InternalError(1)]], Judge::allow());
    // It starts at the shared view of page 0, which then becomes private.
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

// ---- poison

#[test]
fn poison_is_never_a_conversion() {
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

// ---- explicit requests

/// The same request by hypercall and by doorbell.
fn both_ways(request: [u64; 4]) -> [Step; 2] {
    [Step::Hypercall(request), Step::Doorbell(request)]
}

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
    for setup in [PLAIN, SPLIT, MEMSLOTS] {
        for (decision, errno, outcome, state) in &cases {
            for step in both_ways([12, 0x5000, 2, TO_PRIVATE | 1]) {
                let answer = decision.clone();
                let judge = Judge::calls(move |_| Ok(answer.clone()));
                let guest = setup.clone().guest(vec![vec![step]], judge);
                let report = guest.run();
                // Also where the run ended with this request: the answer is the guest's at once.
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
        assert_eq!(guest.machine.events().total(), 0);
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
fn a_conversion_that_fails_is_the_guests_answer() {
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

    // What cannot be undone or freed ends the run; the request stays unanswered.
    for injection in [fail(CallName::SetAttributes, true), fail(CallName::Discard, false)] {
        let guest = PLAIN.guest(script(), Judge::allow());
        guest.fake.inject(injection);
        match guest.try_run() {
            Err(Error::Conversion { site, source }) => {
                assert_eq!((site.vcpu, site.gpa), (0, Some(0x5000)));
                assert_eq!(source.guest_errno(), None);
                let freeing = matches!(source, ConvertError::Discard { .. });
                assert_eq!(freeing, injection.call == CallName::Discard);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(guest.answers(0), []);
        assert_eq!(guest.outcomes(), [Outcome::Failed]);
    }
}

#[test]
fn out_of_slots_is_enospc() {
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

// ---- failures of the policy

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
fn a_decision_outside_memory_is_the_policys_failure() {
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
fn a_fresh_start_drops_what_was_pending() {
    let judge = Judge::calls(once(Err("no idea")));
    let guest = PLAIN.guest(
        vec![vec![
            map_gpa_range(0x5000, 1, TO_PRIVATE),
            map_gpa_range(0x6000, 1, TO_PRIVATE),
        ]],
        judge,
    );
    assert!(guest.try_run().is_err());
    guest.start(0);
    assert_eq!(guest.run().reason, "halt");
    let asked: Vec<u64> = guest.judge.calls.lock().iter().map(|call| call.range.gpa()).collect();
    assert_eq!(asked, [0x5000, 0x6000]);
    assert_eq!(guest.state(0x5000), State::Shared);
}

#[test]
fn only_the_first_failure_is_reported() {
    let judge = Judge::calls(|call| Err(format!("vCPU {}", call.vcpu).into()));
    let guest = PLAIN.guest(vec![vec![map_gpa_range(0x5000, 1, TO_PRIVATE)]; 4], judge);
    assert!(matches!(guest.try_run(), Err(Error::Hook { .. })));
    // Whoever failed asks again, whoever had not asked yet asks now.
    assert!(matches!(guest.try_run(), Err(Error::Hook { .. })));
}

// ---- devices

fn io_read(port: u16, len: usize) -> Step {
    Step::Io {
        port,
        write: false,
        size: 1,
        data: vec![0; len],
    }
}

#[test]
fn port_io_is_answered() {
    let script = vec![io_read(0x10, 3), io_read(0x11, 2)];
    let guest = PLAIN.guest(vec![script], Judge::allow());
    let answer = handler(|_| Ok(()));
    answer.machine.set(&guest);
    guest.machine.on_io(0x10, answer).unwrap();
    guest.run();
    let values: Vec<Vec<u8>> = guest.fake.replies(0).into_iter().map(|reply| reply.value).collect();
    assert_eq!(values, [vec![0x5a; 3], vec![0xff; 2]]);
}

#[test]
fn a_failed_device_is_asked_again() {
    struct Flaky(AtomicU32);
    impl IoHandler for Flaky {
        fn io(&self, _: u32, _: &Io, data: &mut [u8]) -> Result<(), Failure> {
            if self.0.fetch_add(1, Ordering::SeqCst) == 0 {
                return Err("flaky".into());
            }
            data.fill(7);
            Ok(())
        }
    }
    impl MmioHandler for Flaky {
        fn mmio(&self, _: u32, mmio: &Mmio, data: &mut [u8]) -> Result<(), Failure> {
            assert_eq!((mmio.gpa, data.len()), (0xfec0_0008, 8));
            if self.0.fetch_add(1, Ordering::SeqCst) == 0 {
                return Err("flaky".into());
            }
            data.fill(7);
            Ok(())
        }
    }
    let mmio = Step::Access {
        gpa: 0xfec0_0008,
        write: false,
    };
    for step in [io_read(0x10, 8), mmio] {
        let guest = PLAIN.guest(vec![vec![step]], Judge::allow());
        let flaky = Arc::new(Flaky(AtomicU32::new(0)));
        guest.machine.on_io(0x10, flaky.clone()).unwrap();
        guest.machine.on_mmio(0xfec0_0000, 0x1000, flaky.clone()).unwrap();
        match guest.try_run() {
            Err(Error::Hook { failure, .. }) => assert_eq!(failure.to_string(), "flaky"),
            other => panic!("{other:?}"),
        }
        assert!(guest.fake.replies(0).is_empty());
        assert_eq!(guest.run().reason, "halt");
        assert_eq!(flaky.0.load(Ordering::SeqCst), 2);
        assert_eq!(
            guest.fake.replies(0),
            [Reply {
                step: 0,
                value: vec![7; 8]
            }]
        );
    }
}

#[test]
fn an_answer_is_taken_even_where_the_run_ends_at_once() {
    let guest = PLAIN.guest(vec![vec![io_read(0x10, 1), io_read(0x10, 1)]], Judge::allow());
    let stop = handler(|machine| {
        machine.stop();
        Ok(())
    });
    stop.machine.set(&guest);
    guest.machine.on_io(0x10, stop).unwrap();
    for answered in 1..=2 {
        assert_eq!(guest.run().reason, "stopped");
        let replies = guest.fake.replies(0);
        assert_eq!(replies.len(), answered);
        assert!(replies.iter().all(|reply| reply.value == [0x5a]));
    }
    assert_eq!(guest.run().reason, "halt");
}

// ---- how a run ends

/// The fastest of a few attempts, since other work may keep the processors busy.
fn fastest(measure: impl Fn() -> Duration) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..5 {
        best = best.min(measure());
        if best < Duration::from_millis(100) {
            break;
        }
    }
    best
}

#[test]
fn stop_reaches_vcpus_that_do_not_come_out() {
    for setup in [PLAIN, MEMSLOTS] {
        let took = fastest(|| {
            let guest = setup.clone().guest(vec![vec![Step::Block; 50]; 3], Judge::allow());
            std::thread::scope(|scope| {
                let run = scope.spawn(|| guest.run());
                guest.until_running();
                std::thread::sleep(Duration::from_millis(30));
                let begun = Instant::now();
                guest.machine.stop();
                assert_eq!(run.join().unwrap().reason, "stopped");
                begun.elapsed()
            })
        });
        assert!(took < Duration::from_millis(100), "{took:?}");
    }
}

#[test]
fn a_timeout_reaches_vcpus_that_do_not_come_out() {
    let took = fastest(|| {
        let guest = PLAIN.guest(vec![vec![Step::Block; 50]; 2], Judge::allow());
        let begun = Instant::now();
        let timeout = Duration::from_millis(40);
        let report = guest.machine.run(Some(timeout), &mut || Ok(())).unwrap();
        assert_eq!(report.reason, "timeout");
        assert!(report.duration >= timeout);
        begun.elapsed() - timeout
    });
    assert!(took < Duration::from_millis(100), "{took:?}");
}

#[test]
fn a_run_that_timed_out_goes_on() {
    let guest = PLAIN.guest(
        vec![vec![Step::Block, map_gpa_range(0x5000, 1, TO_PRIVATE)]],
        Judge::allow(),
    );
    let run = |milliseconds| {
        let timeout = Duration::from_millis(milliseconds);
        guest.machine.run(Some(timeout), &mut || Ok(())).unwrap().reason
    };
    // Without a kick the first step does not end; how far a short run gets is up to the scheduler.
    assert_eq!(run(20), "timeout");
    for _ in 0..100 {
        match run(50).as_str() {
            "timeout" => {}
            reason => {
                assert_eq!(reason, "halt");
                assert_eq!(guest.state(0x5000), State::Private);
                return;
            }
        }
    }
    panic!("the guest does not get on");
}

#[test]
fn a_run_without_time_is_a_timeout() {
    let guest = PLAIN.guest(vec![vec![Step::Block; 50]], Judge::allow());
    for _ in 0..3 {
        let report = guest.machine.run(Some(Duration::ZERO), &mut || Ok(())).unwrap();
        assert_eq!(report.reason, "timeout");
    }
}

#[test]
fn the_callers_interrupt_ends_the_run() {
    let guest = PLAIN.guest(vec![vec![Step::Block; 50]], Judge::allow());
    let mut asked = 0;
    let ended = guest.machine.run(Some(Duration::from_secs(20)), &mut || {
        asked += 1;
        if asked == 3 { Err("interrupted".into()) } else { Ok(()) }
    });
    assert!(matches!(ended, Err(Error::Interrupted(_))), "{ended:?}");
}

#[test]
fn the_last_halt_ends_the_run_and_one_shutdown_does() {
    let guest = PLAIN.guest(vec![Vec::new(), vec![Step::Halt], vec![Step::Halt]], Judge::allow());
    assert_eq!(guest.run().reason, "halt");
    let guest = PLAIN.guest(vec![vec![Step::Block; 50], vec![Step::Shutdown]], Judge::allow());
    assert_eq!(guest.run().reason, "shutdown");
    // The one that shut down has to be started again.
    let guest = PLAIN.guest(vec![vec![Step::Shutdown]], Judge::allow());
    assert_eq!(guest.run().reason, "shutdown");
    assert!(matches!(guest.try_run(), Err(Error::Busy(_))));
    guest.start(0);
    assert_eq!(guest.run().reason, "halt");
}

#[test]
fn a_running_machine_is_busy() {
    let late = Arc::new(Late::default());
    let inner = late.clone();
    let judge = Judge::calls(move |_| {
        let machine = inner.get();
        assert!(matches!(machine.run(None, &mut || Ok(())), Err(Error::Busy(_))));
        assert!(matches!(machine.start(0, CpuMode::Real, &[]), Err(Error::Busy(_))));
        assert!(matches!(machine.regs(0), Err(Error::Busy(_))));
        // The pages of a request are not locked while it is judged.
        machine.convert(0x5000, PAGE_SIZE, State::Private)?;
        Ok(Decision::as_asked())
    });
    let guest = PLAIN.guest(vec![vec![map_gpa_range(0x5000, 1, TO_PRIVATE)]], judge);
    late.set(&guest);
    assert_eq!(guest.run().reason, "halt");
    assert_eq!(guest.answers(0), [(0, 0)]);
    assert!(!guest.machine.running());
    assert!(guest.machine.regs(0).is_ok());
}

#[test]
fn exits_that_mean_nothing_are_errors() {
    let exit = |errno, reason, words| Step::Exit { errno, reason, words };
    let fault = |flags, gpa, size| exit(libc::EFAULT, EXIT_MEMORY_FAULT, [flags, gpa, size]);
    let memory = PAGES * PAGE_SIZE;
    for step in [
        Step::Fail(libc::EIO),
        Step::Fail(libc::EHWPOISON),
        exit(0, 77, [0; 3]),
        exit(0, EXIT_MEMORY_FAULT, [PRIVATE_FLAG, 0x5000, PAGE_SIZE]),
        exit(0, 9, [1, 0, 0]),
        exit(0, 24, [1, 0, 0]),
        Step::InternalError(1),
        fault(1, 0x5000, PAGE_SIZE),
        fault(PRIVATE_FLAG | 1 << 4, 0x5000, PAGE_SIZE),
        fault(PRIVATE_FLAG, memory, PAGE_SIZE),
        fault(PRIVATE_FLAG, 0x5000, 0),
        fault(PRIVATE_FLAG, memory - PAGE_SIZE, 2 * PAGE_SIZE),
        fault(PRIVATE_FLAG, 0x5008, PAGE_SIZE),
    ] {
        let guest = PLAIN.guest(vec![vec![step.clone()]], Judge::allow());
        assert!(matches!(guest.try_run(), Err(Error::Exit { .. })), "{step:?}");
        assert_eq!(guest.machine.memory().snapshot().generation(), 0);
        assert!(guest.judge.faults.lock().is_empty());
    }
    // A page that an earlier exit left behind is not believed.
    let stale = vec![memory_fault(PRIVATE_FLAG, 0x5000), Step::Fail(libc::EFAULT)];
    let guest = PLAIN.guest(vec![stale], Judge::allow());
    assert!(matches!(guest.try_run(), Err(Error::BadBacking { .. })));
    assert_eq!(guest.judge.faults.lock().len(), 1);
}

#[test]
fn refusals_of_kvm_are_tried_again_but_not_for_ever() {
    let mut script = Vec::new();
    for errno in [libc::EINTR, libc::EAGAIN, libc::ENOMEM] {
        script.extend(vec![Step::Fail(errno); 20]);
    }
    script.push(map_gpa_range(0x5000, 1, TO_PRIVATE));
    let guest = PLAIN.guest(vec![script], Judge::allow());
    assert_eq!(guest.run().reason, "halt");
    assert_eq!(guest.state(0x5000), State::Private);
    for errno in [libc::EAGAIN, libc::ENOMEM] {
        let guest = PLAIN.guest(vec![vec![Step::Fail(errno); 3000]], Judge::allow());
        assert!(matches!(guest.try_run(), Err(Error::Exit { .. })));
    }
}

#[test]
fn refusals_of_kvm_are_counted_afresh_after_each_way_that_an_exit_is_answered() {
    let refused = || vec![Step::Fail(libc::EAGAIN); 600];
    let io = || Step::Io {
        port: 0x10,
        write: true,
        size: 1,
        data: vec![1],
    };
    // The handler is looked for the first time, and known the second.
    let answered = [vec![map_gpa_range(0x5000, 1, TO_PRIVATE)], vec![io(), io()], vec![io()]];
    let mut script = refused();
    for steps in answered {
        script.extend(steps);
        script.extend(refused());
    }
    let guest = PLAIN.guest(vec![script], Judge::allow());
    let quiet = handler(|_| Ok(()));
    quiet.machine.set(&guest);
    guest.machine.on_io(0x10, quiet).unwrap();
    assert_eq!(guest.run().reason, "halt");
}

// ---- record

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
            // The last ones are kept.
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
fn a_request_is_over_when_the_guest_resumes() {
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
fn sequences_go_on_from_run_to_run() {
    let judge = Judge::calls(once(Ok(Decision::Stop("enough".to_owned()))));
    let guest = PLAIN.guest(vec![vec![map_gpa_range(0x5000, 1, TO_PRIVATE); 3]], judge);
    assert_eq!(guest.run().tally.hypercalls, 1);
    assert_eq!(guest.run().tally.hypercalls, 2);
    let sequences: Vec<u64> = guest.events().iter().map(|event| event.sequence).collect();
    assert_eq!(sequences, [0, 1, 2]);
}

#[test]
fn a_tally_is_the_sum_over_vcpus() {
    // Each its own pages; one in four requests is denied, one in four retried, and one is malformed.
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
        // The log tells the same.
        let events = guest.events();
        let count = |outcome| events.iter().filter(|event| event.outcome == outcome).count();
        let counts = [Outcome::Converted, Outcome::Denied, Outcome::Retried].map(count);
        assert_eq!(counts, [200, 100, 100]);
        assert_eq!(events.iter().map(|event| event.changed).sum::<u64>(), 2 * 100 * 0x4000);
        guest.agrees(&setup);
    }
}

// ---- several vCPUs

#[test]
fn vcpus_that_fight_over_pages_leave_kvm_and_the_map_in_agreement() {
    for setup in [PLAIN, SPLIT, MEMSLOTS] {
        within_patience(move || {
            let setup = Setup { cycles: 20, ..setup };
            let script = |vcpu: u64| {
                let mut script = Vec::new();
                for i in 0..8 {
                    let gpa = 0x4000 + ((i * 3 + vcpu) % 8) * PAGE_SIZE;
                    match (setup.split, (i + vcpu) % 3) {
                        (true, 0) => script.push(private_view(gpa, true)),
                        (true, 1) => script.push(shared_view(gpa, false)),
                        (_, kind) => script.push(map_gpa_range(
                            gpa,
                            1 + i % 3,
                            [TO_PRIVATE, TO_SHARED, TO_PRIVATE][kind as usize],
                        )),
                    }
                }
                script
            };
            let guest = setup.clone().guest((0..4).map(script).collect(), Judge::allow());
            let report = guest.run();
            assert_eq!(report.reason, "halt");
            let tally = &report.tally;
            // An explicit request whose pages changed meanwhile is put to the policy again.
            assert!(guest.judge.calls.lock().len() as u64 >= tally.hypercalls);
            assert_eq!(guest.judge.faults.lock().len() as u64, tally.faults);
            assert_eq!(guest.machine.events().total(), tally.requests());
            let private = guest.machine.memory().snapshot().private_bytes();
            assert_eq!(tally.bytes_to_private - tally.bytes_to_shared, private);
            guest.agrees(&setup);
        });
    }
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

#[test]
fn host_conversions_during_a_run_do_not_wait_for_blocked_vcpus() {
    within_patience(|| {
        let scripts = vec![vec![Step::Block; 10_000]; 2];
        let guest = MEMSLOTS.guest(scripts, Judge::allow());
        std::thread::scope(|scope| {
            let run = scope.spawn(|| guest.run());
            guest.until_running();
            std::thread::sleep(Duration::from_millis(20));
            for round in 0..20_u64 {
                let to = if round % 2 == 0 { State::Private } else { State::Shared };
                guest.machine.convert(0x5000, PAGE_SIZE, to).unwrap();
            }
            guest.machine.stop();
            assert_eq!(run.join().unwrap().reason, "stopped");
        });
        guest.agrees(&MEMSLOTS);
    });
}

#[test]
fn vcpus_that_were_not_started_stay_out() {
    let limits = FakeVm::protected(8);
    let fake = Arc::new(FakeVm::new(
        limits,
        vec![vec![Step::Shutdown], vec![map_gpa_range(0, 1, TO_PRIVATE)]],
        1,
    ));
    let config = Config {
        memory: PAGES * PAGE_SIZE,
        vcpus: 2,
        vm_type: None,
        enforcement: None,
        shared_bit: None,
        initial: State::Shared,
        events: 10,
        memslots: 1,
        policy: Arc::new(Judge::allow()),
        around: None,
        hypervisor: Some(fake),
    };
    let machine = Machine::new(config).unwrap();
    assert!(matches!(machine.run(None, &mut || Ok(())), Err(Error::Busy(_))));
    machine.start(1, CpuMode::Real, &[]).unwrap();
    let report = machine.run(Some(Duration::from_secs(20)), &mut || Ok(())).unwrap();
    assert_eq!((report.reason.as_str(), report.tally.hypercalls), ("halt", 1));
    assert_eq!(machine.memory().describe(Range::new(0, PAGE_SIZE).unwrap()), "private");
}
