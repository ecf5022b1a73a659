//! What all runs are made of: guests on the fake, what their steps are, and a policy that keeps what it was asked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use pagegate_core::boot::start::CpuMode;
use pagegate_core::devices::bus::IoHandler;
use pagegate_core::error::{Error, Failure};
use pagegate_core::events::event::{Event, Outcome};
use pagegate_core::hypervisor::exit::Io;
use pagegate_core::hypervisor::fake::{FakeVm, Reply, Step};
use pagegate_core::hypervisor::host::EnforcementMode;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::Config;
use pagegate_core::machine::report::Report;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::policy::decision::{Convert, Decision};
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::request::{ExplicitRequest, ImplicitRequest};
use parking_lot::Mutex;

use crate::common::{BIT, check_told, limits};

pub const PAGES: u64 = 64;
pub const PRIVATE_FLAG: u64 = 1 << 3;
pub const EXIT_MEMORY_FAULT: u32 = 39;
pub const TO_SHARED: u64 = 0;
pub const TO_PRIVATE: u64 = 0x10;

pub type Hook<Request> = Box<dyn Fn(&Request) -> Result<Decision, Failure> + Send + Sync>;

/// A policy that answers as the test says, and keeps each request that it was asked about.
pub struct Judge {
    pub fault: Hook<ImplicitRequest>,
    pub call: Hook<ExplicitRequest>,
    pub poison: Hook<ImplicitRequest>,
    pub faults: Mutex<Vec<ImplicitRequest>>,
    pub calls: Mutex<Vec<ExplicitRequest>>,
    pub poisons: Mutex<Vec<ImplicitRequest>>,
}

impl Judge {
    pub fn allow() -> Self {
        Self {
            fault: Box::new(|_| Ok(Decision::as_asked())),
            call: Box::new(|_| Ok(Decision::as_asked())),
            poison: Box::new(|_| Ok(Decision::Stop("poison".to_owned()))),
            faults: Mutex::default(),
            calls: Mutex::default(),
            poisons: Mutex::default(),
        }
    }

    pub fn faults(answer: impl Fn(&ImplicitRequest) -> Result<Decision, Failure> + Send + Sync + 'static) -> Self {
        Self {
            fault: Box::new(answer),
            ..Self::allow()
        }
    }

    pub fn calls(answer: impl Fn(&ExplicitRequest) -> Result<Decision, Failure> + Send + Sync + 'static) -> Self {
        Self {
            call: Box::new(answer),
            ..Self::allow()
        }
    }

    pub fn poisons(answer: impl Fn(&ImplicitRequest) -> Result<Decision, Failure> + Send + Sync + 'static) -> Self {
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
pub fn once<Request>(first: Result<Decision, &'static str>) -> impl Fn(&Request) -> Result<Decision, Failure> {
    let asked = AtomicBool::new(false);
    move |_| match asked.swap(true, Ordering::SeqCst) {
        false => Ok(first.clone()?),
        true => Ok(Decision::as_asked()),
    }
}

pub struct Guest {
    pub fake: Arc<FakeVm>,
    pub machine: Arc<Machine>,
    pub judge: Arc<Judge>,
}

#[derive(Clone)]
pub struct Setup {
    pub mode: EnforcementMode,
    pub split: bool,
    pub initial: State,
    pub events: usize,
    pub cycles: u64,
    pub memslots: u32,
}

pub const PLAIN: Setup = Setup {
    mode: EnforcementMode::Attributes,
    split: false,
    initial: State::Shared,
    events: 1000,
    cycles: 1,
    memslots: 512,
};
pub const SPLIT: Setup = Setup { split: true, ..PLAIN };
pub const TRAPS: Setup = Setup {
    mode: EnforcementMode::Traps,
    ..SPLIT
};
pub const MEMSLOTS: Setup = Setup {
    mode: EnforcementMode::Memslots,
    ..SPLIT
};

impl Setup {
    pub fn guest(self, scripts: Vec<Vec<Step>>, judge: Judge) -> Guest {
        let vcpus = scripts.len() as u32;
        let fake = Arc::new(FakeVm::new(limits(self.mode, self.memslots), scripts, self.cycles));
        let judge = Arc::new(judge);
        let config = Config {
            vcpus,
            enforcement: Some(self.mode),
            shared_bit: self.split.then_some(BIT),
            initial: self.initial,
            events: self.events,
            hypervisor: Some(fake.clone()),
            ..Config::new(PAGES * PAGE_SIZE, judge.clone())
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
    pub fn start(&self, vcpu: usize) {
        let mode = match self.machine.memory().views().split() {
            // Real mode does not reach the shared views.
            true => CpuMode::Long,
            false => CpuMode::Real,
        };
        self.machine.start(vcpu, mode, &[], &mut || Ok(())).unwrap();
    }

    pub fn try_run(&self) -> Result<Report, Error> {
        self.machine.run(Some(Duration::from_secs(20)), &mut || Ok(()))
    }

    pub fn run(&self) -> Report {
        self.try_run().unwrap()
    }

    /// Waits until each of the first `vcpus` vCPUs is in KVM_RUN after the first answer that it got: the fake records
    /// an answer at the start of the next KVM_RUN.
    pub fn wait_for_vcpus_in_kvm_run(&self, vcpus: usize) {
        let begun = Instant::now();
        while (0..vcpus).any(|vcpu| self.fake.replies(vcpu).is_empty()) {
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "a vCPU does not enter KVM_RUN"
            );
            std::thread::yield_now();
        }
    }

    pub fn events(&self) -> Vec<Event> {
        self.machine.events().since(0)
    }

    pub fn outcomes(&self) -> Vec<Outcome> {
        self.events().iter().map(|event| event.outcome).collect()
    }

    pub fn state(&self, gpa: u64) -> State {
        self.machine.memory().snapshot().state(gpa)
    }

    /// What the guest got for its requests: the step, and RAX as a signed number.
    pub fn answers(&self, vcpu: usize) -> Vec<(usize, i64)> {
        let answer = |reply: Reply| (reply.step, i64::from_le_bytes(reply.value.try_into().unwrap()));
        self.fake.replies(vcpu).into_iter().map(answer).collect()
    }

    /// Checks that KVM was told what the map says, for each page and view.
    pub fn agrees(&self, setup: &Setup) {
        for page in 0..PAGES {
            let gpa = page * PAGE_SIZE;
            check_told(&self.fake, setup.mode, setup.split, gpa, self.state(gpa));
        }
    }
}

pub fn private_view(gpa: u64, write: bool) -> Step {
    Step::Access { gpa, write }
}

pub fn shared_view(gpa: u64, write: bool) -> Step {
    let gpa = gpa | 1 << BIT;
    Step::Access { gpa, write }
}

pub fn map_gpa_range(gpa: u64, pages: u64, attributes: u64) -> Step {
    Step::Hypercall([12, gpa, pages, attributes])
}

/// A memory fault as KVM reports it. It comes once, whatever is done about it.
pub fn memory_fault(flags: u64, gpa: u64) -> Step {
    Step::Exit {
        errno: libc::EFAULT,
        reason: EXIT_MEMORY_FAULT,
        words: [flags, gpa, PAGE_SIZE],
    }
}

pub fn poison(gpa: u64) -> Step {
    Step::Exit {
        errno: libc::EHWPOISON,
        reason: EXIT_MEMORY_FAULT,
        words: [PRIVATE_FLAG, gpa, PAGE_SIZE],
    }
}

pub fn convert_to(to: State) -> Decision {
    Decision::Convert(Convert {
        to: Some(to),
        ..Default::default()
    })
}

pub fn convert_at(gpa: u64, size: u64) -> Decision {
    Decision::Convert(Convert {
        gpa: Some(gpa),
        size: Some(size),
        ..Default::default()
    })
}

/// A handler of port IO that does something with the machine; reads get bytes of 0x5a.
pub struct Handler<F> {
    pub machine: Late,
    act: F,
}

/// The machine, for a hook or handler that has to be there before the machine is.
#[derive(Default)]
pub struct Late(Mutex<Option<Weak<Machine>>>);

impl Late {
    pub fn set(&self, guest: &Guest) {
        *self.0.lock() = Some(Arc::downgrade(&guest.machine));
    }

    pub fn get(&self) -> Arc<Machine> {
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

pub fn handler<F: Fn(&Machine) -> Result<(), Failure> + Send + Sync>(act: F) -> Arc<Handler<F>> {
    Arc::new(Handler {
        machine: Late::default(),
        act,
    })
}

/// The same request by hypercall and by doorbell.
pub fn both_ways(request: [u64; 4]) -> [Step; 2] {
    [Step::Hypercall(request), Step::Doorbell(request)]
}

/// INS of `len` bytes.
pub fn io_read(port: u16, len: usize) -> Step {
    Step::Io {
        port,
        write: false,
        size: 1,
        data: vec![0; len],
    }
}

/// OUT of one byte.
pub fn io_write(port: u16) -> Step {
    Step::Io {
        port,
        write: true,
        size: 1,
        data: vec![1],
    }
}
