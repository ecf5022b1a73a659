//! A virtual machine: memory, vCPUs, the gate between private and shared, and who judges.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_regs;
use parking_lot::{Mutex, MutexGuard};

use crate::attributes::{PAGE_SIZE, Range, State};
use crate::boot;
use crate::clock::Stopwatch;
use crate::control::Control;
use crate::convert::{Converted, Gate, Resident};
use crate::devices::{Devices, IoHandler, MmioHandler};
use crate::enforce::{Enforcement, Failure as EnforceFailure, Mode};
use crate::error::{ConvertError, Error, Failure};
use crate::events::EventLog;
use crate::hypervisor::Hypervisor;
use crate::hypervisor::fake::FakeVm;
use crate::hypervisor::kvm::KvmVm;
use crate::image::Image;
use crate::kick::Kick;
use crate::ledger::Ledger;
use crate::listener::{self, Listener};
use crate::memory::{Backing, GuestMemory};
use crate::policy::Policy;
use crate::probe::{self, VmType};
use crate::report::{Report, Tally};
use crate::run::VcpuLoop;
use crate::vcpu::VcpuState;
use crate::views::Views;

/// Runs a vCPU thread's body; a binding puts what its callbacks need around it.
pub type ThreadWrapper = Arc<dyn Fn(&mut (dyn FnMut() + Send)) + Send + Sync>;

/// What a machine is made of.
pub struct Config {
    /// Bytes of guest memory, from gpa 0 on; a multiple of 4096.
    pub memory: u64,
    /// How many vCPUs.
    pub vcpus: u32,
    /// `None`: whichever `enforcement` needs.
    pub vm_type: Option<VmType>,
    /// `None`: attributes where the host has them, else memslots.
    pub enforcement: Option<Mode>,
    /// The address bit that chooses the shared view.
    pub shared_bit: Option<u32>,
    /// The state of all pages at first.
    pub initial: State,
    /// Room in the event log.
    pub events: usize,
    /// Memory is divided into this many equal parts, and no memslot crosses from one to the next.
    pub memslots: u32,
    /// Who judges.
    pub policy: Arc<dyn Policy>,
    /// Around each vCPU thread.
    pub around: Option<ThreadWrapper>,
    /// Instead of /dev/kvm.
    pub fake: Option<Arc<FakeVm>>,
}

/// A virtual machine.
pub struct Machine {
    vcpus: Vec<Mutex<VcpuState>>,
    kicks: Vec<Arc<Kick>>,
    gate: Gate,
    policy: Mutex<Arc<dyn Policy>>,
    /// Grows when the policy is replaced.
    policy_version: AtomicU64,
    devices: Devices,
    events: Arc<EventLog>,
    /// The run in progress.
    current: Mutex<Option<Arc<Control>>>,
    around: Option<ThreadWrapper>,
    stopwatch: Stopwatch,
    pre_fault: bool,
    /// Last, so that it outlives the VM whose slots point into it.
    _memory: Arc<GuestMemory>,
}

/// The policy that judged a vCPU's last request.
pub(crate) struct KnownPolicy {
    version: u64,
    policy: Arc<dyn Policy>,
}

/// The largest memslot, where slots are swapped.
const LARGEST_SWAPPED: u64 = 1 << 30;

const VCPU_RUNNING: &str = "the vCPU is running: registers can be reached between runs only";

impl Machine {
    /// Makes one.
    ///
    /// # Errors
    /// `KvmUnavailable`, `NotSupported`, `Invalid` for an argument, `Host` where the kernel refused.
    pub fn new(config: Config) -> Result<Self, Error> {
        let views = check(&config)?;
        let (vm, mode) = open(&config, views)?;
        let limits = vm.limits();
        if views.end() > 1 << limits.physical_bits {
            let bits = limits.physical_bits;
            let message = format!(
                "guest-physical addresses have {bits} bits here, and memory with its views ends at {:#x}; use less \
                 memory or a lower shared_bit",
                views.end()
            );
            return Err(Error::NotSupported(message));
        }
        if config.vcpus > limits.vcpus {
            let message = format!("this host allows {} vCPUs", limits.vcpus);
            return Err(Error::NotSupported(message));
        }
        let memory = Arc::new(GuestMemory::new(config.memory, vm.as_ref())?);
        let mut borders = borders(config.memory, config.memslots);
        if mode == Mode::Memslots {
            // Where KVM shadows page tables, making a slot costs as much as it is large.
            borders.extend((1..config.memory.div_ceil(LARGEST_SWAPPED)).map(|part| part * LARGEST_SWAPPED));
            borders.sort_unstable();
            borders.dedup();
        }
        let enforcement = Enforcement::new(mode, vm.clone(), memory.clone(), views, borders);
        let all = Range::new(0, config.memory).ok_or(Error::Busy("memory is empty"))?;
        enforcement.start(all, config.initial).map_err(set_up)?;
        let (events, writers) = EventLog::new(config.events, config.vcpus as usize);
        let vcpu = |(index, log)| -> Result<VcpuState, Error> {
            let what = "create a vCPU";
            let hv = vm.create_vcpu(index).map_err(|errno| Error::Host { what, errno })?;
            VcpuState::new(index, hv, log).map_err(|errno| Error::Host { what, errno })
        };
        let vcpus = (0..config.vcpus)
            .zip(writers)
            .map(vcpu)
            .collect::<Result<Vec<_>, _>>()?;
        let kicks: Vec<Arc<Kick>> = vcpus
            .iter()
            .map(|vcpu| Arc::new(Kick::new(vcpu.hv.exit_flag())))
            .collect();
        let ledger = Ledger::new(config.memory, config.initial, vcpus.len());
        Ok(Self {
            gate: Gate::new(ledger, views, enforcement, vm, memory.clone(), kicks.clone()),
            events: Arc::new(events),
            vcpus: vcpus.into_iter().map(Mutex::new).collect(),
            kicks,
            policy: Mutex::new(config.policy),
            policy_version: AtomicU64::new(0),
            devices: Devices::default(),
            current: Mutex::new(None),
            around: config.around,
            stopwatch: Stopwatch::new(),
            pre_fault: limits.pre_fault,
            _memory: memory,
        })
    }

    /// The gate.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// How states are enforced.
    pub fn enforcement(&self) -> Mode {
        self.gate.enforcement().mode()
    }

    /// How many vCPUs.
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    /// The log of requests.
    pub fn events(&self) -> &Arc<EventLog> {
        &self.events
    }

    /// Who judges a request that comes now, for a vCPU that knows who judged the last one. It stays even if it is
    /// replaced meanwhile.
    #[inline]
    pub(crate) fn policy<'a>(&self, known: &'a mut KnownPolicy) -> &'a dyn Policy {
        // Acquire, and before the policy is read: a replacement that is counted is the one that is found.
        let version = self.policy_version.load(Ordering::Acquire);
        if known.version != version {
            *known = self.known_policy();
        }
        known.policy.as_ref()
    }

    pub(crate) fn known_policy(&self) -> KnownPolicy {
        KnownPolicy {
            version: self.policy_version.load(Ordering::Acquire),
            policy: self.policy.lock().clone(),
        }
    }

    /// Another policy judges from now on: every request that comes once this has returned. One that is being judged is
    /// answered by the old one.
    pub fn replace_policy(&self, policy: Arc<dyn Policy>) {
        let old = std::mem::replace(&mut *self.policy.lock(), policy);
        self.policy_version.fetch_add(1, Ordering::Release);
        // Outside the lock: what it refers to may run code of its own when it goes.
        drop(old);
    }

    pub(crate) fn devices(&self) -> &Devices {
        &self.devices
    }

    pub(crate) fn kick(&self, vcpu: u32) -> &Kick {
        &self.kicks[vcpu as usize]
    }

    /// Answers a port from now on.
    ///
    /// # Errors
    /// `Invalid` for the doorbell's port and for one that has a handler.
    pub fn on_io(&self, port: u16, handler: Arc<dyn IoHandler>) -> Result<(), Error> {
        self.devices.on_io(port, handler)
    }

    /// Answers an MMIO range from now on.
    ///
    /// # Errors
    /// `Invalid` for a range that is empty, wraps, or overlaps memory, a view or another handler's.
    pub fn on_mmio(&self, gpa: u64, size: u64, handler: Arc<dyn MmioHandler>) -> Result<(), Error> {
        self.devices.on_mmio(gpa, size, &self.gate.views(), handler)
    }

    pub(crate) fn stopwatch(&self) -> Stopwatch {
        self.stopwatch
    }

    pub(crate) fn can_prefault(&self) -> bool {
        self.pre_fault
    }

    /// Tells a listener the present state, and from then on of every conversion.
    ///
    /// # Errors
    /// `Busy` from inside a listener; the listener's own as `HostConversion`.
    pub fn add_listener(&self, listener: Arc<dyn Listener>) -> Result<(), Error> {
        outside_listeners()?;
        let failed = |failure| Error::HostConversion(ConvertError::Listener(failure));
        self.gate.join(listener).map_err(failed)
    }

    /// Tells a listener nothing more. Whether it was one.
    pub fn remove_listener(&self, listener: &Arc<dyn Listener>) -> bool {
        self.gate.listeners().leave(listener)
    }

    /// Converts on the host's own account: no policy is asked.
    ///
    /// # Errors
    /// As [`Gate::convert`].
    pub fn convert(&self, gpa: u64, size: u64, to: State) -> Result<Converted, Error> {
        outside_listeners()?;
        Ok(self.gate.convert(gpa, size, to, false)?)
    }

    /// Copies out of shared pages.
    ///
    /// # Errors
    /// `PrivateMemory` with the first private page; `HostConversion` with the range if it leaves memory.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), Error> {
        let len = into.len() as u64;
        self.touch(gpa, len, "read", |shared, gpa| shared.read(gpa, into))
    }

    /// Copies into shared pages.
    ///
    /// # Errors
    /// As [`Machine::read`].
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<(), Error> {
        let len = from.len() as u64;
        self.touch(gpa, len, "write", |shared, gpa| shared.write(gpa, from))
    }

    fn touch(
        &self,
        gpa: u64,
        len: u64,
        what: &'static str,
        access: impl FnOnce(&Backing, u64) -> Result<(), crate::errno::Errno>,
    ) -> Result<(), Error> {
        outside_listeners()?;
        let gpa = gpa & !self.gate.views().shared_mask();
        if len == 0 {
            return Ok(());
        }
        let (size, memory) = (len, self.gate.views().size());
        let outside = |_| Error::Outside { gpa, size, memory };
        let done = self.gate.on_shared(gpa, len, |shared| access(shared, gpa));
        match done.map_err(outside)? {
            Ok(done) => done.map_err(|errno| Error::Host {
                what: "reach the guest's shared memory",
                errno,
            }),
            Err(gpa) => Err(Error::PrivateMemory { gpa, what }),
        }
    }

    /// How much memory the guest occupies.
    ///
    /// # Errors
    /// `Host` where the kernel does not tell.
    pub fn resident(&self) -> Result<Resident, Error> {
        let what = "count resident memory";
        self.gate.resident().map_err(|errno| Error::Host { what, errno })
    }

    /// Puts an image into memory. Pages of it that are private become shared: KVM reads code from there.
    ///
    /// # Errors
    /// `Invalid` for a segment outside memory; as [`Machine::convert`] and [`Machine::write`].
    pub fn load(&self, image: &Image<'_>) -> Result<u64, Error> {
        const ZEROES: [u8; 4096] = [0; 4096];
        for segment in &image.segments {
            let len = (segment.bytes.len() as u64).saturating_add(segment.zeroes);
            if len == 0 {
                continue;
            }
            let Some(pages) = self.gate.pages(segment.gpa, len) else {
                let (gpa, memory) = (segment.gpa, self.gate.views().size());
                let message = format!("the image's {len:#x} bytes at {gpa:#x} lie outside the guest's {memory:#x}");
                return Err(Error::Invalid(message));
            };
            self.convert(pages.gpa(), pages.size(), State::Shared)?;
            self.write(segment.gpa, segment.bytes)?;
            let mut at = segment.gpa + segment.bytes.len() as u64;
            let end = segment.gpa + len;
            while at < end {
                let part = (end - at).min(PAGE_SIZE);
                self.write(at, &ZEROES[..part as usize])?;
                at += part;
            }
        }
        Ok(image.entry)
    }

    /// Sets a vCPU's registers for its next run. What KVM still waited for is dropped.
    ///
    /// With a shared bit, `rip` is taken at the view that its page is in: an instruction cannot be fetched from
    /// the other one, and code that became private by being fetched would be zeroes.
    ///
    /// # Errors
    /// `Invalid` for a register that does not exist or an address that the mode cannot reach, `Busy` while it runs.
    pub fn start(&self, vcpu: usize, mode: boot::Mode, given: &[(String, u64)]) -> Result<(), Error> {
        let mut state = self.idle_vcpu(vcpu)?;
        let views = self.gate.views();
        let tables = match mode {
            boot::Mode::Long => Some(boot::tables(views)?),
            boot::Mode::Real | boot::Mode::Protected => None,
        };
        let stack = tables.as_ref().map_or(0, |tables| stack(tables.gpa, vcpu, views));
        let mut sregs = boot::sregs(mode, &state.reset_sregs, tables.as_ref(), views);
        let mut regs = boot::regs(given, stack, &mut sregs)?;
        if let Some(place) = views.locate(regs.rip)
            && self.gate.with_map(|map| map.state(place.gpa)) == State::Shared
        {
            regs.rip = views.address(place.gpa, State::Shared);
        }
        let reach = match mode {
            boot::Mode::Real => 1 << 16,
            boot::Mode::Protected => 1 << 32,
            boot::Mode::Long => u64::MAX,
        };
        if regs.rip >= reach {
            let message = format!(
                "rip {:#x} cannot be reached in this mode, which ends at {reach:#x}: use mode \"long\"",
                regs.rip
            );
            return Err(Error::Invalid(message));
        }
        if let Some(tables) = &tables {
            self.convert(tables.gpa, tables.bytes.len() as u64, State::Shared)?;
            self.write(tables.gpa, &tables.bytes)?;
        }
        state.abandon(&self.kicks[vcpu], self.gate.enforcement().world());
        let set = state.hv.set_sregs(&sregs).and_then(|()| state.hv.set_regs(&regs));
        let what = "set the vCPU's registers";
        set.map_err(|errno| Error::Host { what, errno })?;
        state.started = true;
        Ok(())
    }

    /// A vCPU's general registers, between runs.
    ///
    /// # Errors
    /// `Busy` while it runs.
    pub fn regs(&self, vcpu: usize) -> Result<kvm_regs, Error> {
        let what = "read the vCPU's registers";
        let state = self.idle_vcpu(vcpu)?;
        state.hv.regs().map_err(|errno| Error::Host { what, errno })
    }

    fn idle_vcpu(&self, vcpu: usize) -> Result<MutexGuard<'_, VcpuState>, Error> {
        let Some(vcpu) = self.vcpus.get(vcpu) else {
            let message = format!(
                "there are {} vCPUs, so the last is {}",
                self.vcpus.len(),
                self.vcpus.len() - 1
            );
            return Err(Error::Invalid(message));
        };
        vcpu.try_lock().ok_or(Error::Busy(VCPU_RUNNING))
    }

    /// Runs every started vCPU, each in a thread of its own, until something ends the run. `interrupt` is asked
    /// some forty times a second whether the caller must stop.
    ///
    /// # Errors
    /// The first thing that went wrong, once.
    pub fn run(
        &self,
        timeout: Option<Duration>,
        interrupt: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Report, Error> {
        outside_listeners()?;
        /// The run is over, however it ended.
        struct Over<'a>(&'a Mutex<Option<Arc<Control>>>);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                *self.0.lock() = None;
            }
        }
        let begun = Instant::now();
        let (control, vcpus) = self.begin()?;
        let over = Over(&self.current);
        let deadline = timeout.and_then(|timeout| begun.checked_add(timeout));
        let mut total = Tally::default();
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for vcpu in vcpus {
                let name = format!("pagegate-vcpu{}", vcpu.index);
                let body = || self.vcpu_thread(&control, vcpu);
                match std::thread::Builder::new().name(name).spawn_scoped(scope, body) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        control.thread_ended();
                        let what = "start a vCPU thread";
                        let errno = error.into();
                        control.finish(Err(Error::Host { what, errno }));
                    }
                }
            }
            control.wait(deadline, interrupt);
            for thread in threads {
                match thread.join() {
                    Ok(tally) => total.add(tally),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
        });
        drop(over);
        Ok(Report {
            reason: control.take_end()?,
            tally: total,
            duration: begun.elapsed(),
        })
    }

    fn begin(&self) -> Result<(Arc<Control>, Vec<MutexGuard<'_, VcpuState>>), Error> {
        let mut current = self.current.lock();
        if current.is_some() {
            return Err(Error::Busy(
                "this machine is running already: run() is not to be called again meanwhile, nor from inside a hook",
            ));
        }
        // Whoever else has one between runs, to start it or to look at it, has it for a moment.
        let mut vcpus: Vec<_> = self.vcpus.iter().map(Mutex::lock).collect();
        vcpus.retain(|vcpu| vcpu.started);
        if vcpus.is_empty() {
            return Err(Error::Busy(
                "no vCPU is ready to run: call vm.vcpus[0].start(...) first",
            ));
        }
        let kicks = vcpus.iter().map(|vcpu| self.kicks[vcpu.index as usize].clone());
        let control = Arc::new(Control::new(kicks.collect()));
        *current = Some(control.clone());
        Ok((control, vcpus))
    }

    fn vcpu_thread(&self, control: &Control, mut vcpu: MutexGuard<'_, VcpuState>) -> Tally {
        /// Says that the thread ended, however it did.
        struct Ended<'a>(&'a Control);
        impl Drop for Ended<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.stop("stopped");
                }
                self.0.thread_ended();
            }
        }
        let _ended = Ended(control);
        let mut tally = Tally::default();
        let mut body = || match self.kick(vcpu.index).attach() {
            Ok(_attached) => tally = VcpuLoop::new(self, control, &mut vcpu).run(),
            Err(errno) => {
                let what = "install the signal handler that stops vCPUs";
                control.finish(Err(Error::Host { what, errno }));
            }
        };
        match &self.around {
            Some(around) => around(&mut body),
            None => body(),
        }
        tally
    }

    /// Ends the run in progress, from any thread; without one it does nothing.
    pub fn stop(&self) {
        let current = self.current.lock().clone();
        if let Some(control) = current {
            control.stop("stopped");
        }
    }

    /// Whether a run is in progress.
    pub fn running(&self) -> bool {
        self.current.lock().is_some()
    }

    /// Lets go of all handlers and listeners, which may refer back to whoever holds this machine.
    pub fn clear_handlers(&self) {
        self.gate.listeners().clear();
        self.devices.clear();
    }
}

/// Where a vCPU's stack begins: below the tables, a page for each, in the shared view.
fn stack(tables: u64, vcpu: usize, views: Views) -> u64 {
    let below = tables.saturating_sub(vcpu as u64 * PAGE_SIZE);
    views.address(below, State::Shared)
}

fn outside_listeners() -> Result<(), Error> {
    match listener::inside() {
        true => Err(Error::Busy(
            "a listener holds the pages it is told of: it must not convert, read or write guest memory from within",
        )),
        false => Ok(()),
    }
}

fn check(config: &Config) -> Result<Views, Error> {
    let invalid = |why: String| Err(Error::Invalid(why));
    let memory = config.memory;
    if memory == 0 || !memory.is_multiple_of(PAGE_SIZE) || memory > 1 << 52 {
        return invalid(format!(
            "memory is {memory:#x} bytes: it must be a positive multiple of 4096"
        ));
    }
    if config.vcpus == 0 {
        return invalid("a machine needs at least one vCPU".to_owned());
    }
    if let Some(bit) = config.shared_bit
        && (bit > 51 || memory > 1 << bit)
    {
        return invalid(format!(
            "shared_bit={bit} must lie above all of memory ({memory:#x} bytes) and below bit 52"
        ));
    }
    if config.memslots == 0 || u64::from(config.memslots) > memory / PAGE_SIZE {
        return invalid(format!(
            "memslots={} must be at least 1 and leave each a page",
            config.memslots
        ));
    }
    Ok(Views::new(memory, config.shared_bit))
}

fn open(config: &Config, views: Views) -> Result<(Arc<dyn Hypervisor>, Mode), Error> {
    if let Some(fake) = &config.fake {
        let attributes = fake.limits().private_attribute;
        let native = if attributes { Mode::Attributes } else { Mode::Memslots };
        return Ok((fake.clone(), config.enforcement.unwrap_or(native)));
    }
    probe::open()?;
    let host = probe::probe();
    let native = host.enforcement.unwrap_or(Mode::Memslots);
    let mode = config.enforcement.unwrap_or(match config.vm_type {
        Some(VmType::Default) => Mode::Memslots,
        _ => native,
    });
    let kind = config.vm_type.unwrap_or(match mode {
        Mode::Attributes => VmType::SwProtected,
        Mode::Memslots => VmType::Default,
    });
    let unsupported = |why: String| Err(Error::NotSupported(why));
    if !host.vm_types.contains(&kind) {
        let names: Vec<&str> = host.vm_types.iter().map(|kind| kind.as_str()).collect();
        let remedy = match kind {
            VmType::SwProtected => {
                "; a kernel with CONFIG_KVM_SW_PROTECTED_VM has it, and `pagegate testbed -- COMMAND` runs a command on one"
            }
            _ => "; it takes hardware that has it, and pagegate does not launch it yet",
        };
        let (kind, names) = (kind.as_str(), names.join(", "));
        return unsupported(format!("this host has no VM type {kind:?}, only {names}{remedy}"));
    }
    match (kind, mode) {
        (VmType::Default, Mode::Memslots) | (VmType::SwProtected, Mode::Attributes) => {}
        (VmType::Default, Mode::Attributes) => {
            return unsupported(
                "enforcement=\"attributes\" needs a VM type with private memory; \"default\" has none".to_owned(),
            );
        }
        (VmType::SwProtected, Mode::Memslots) => {
            return unsupported(
                "enforcement=\"memslots\" is for vm_type=\"default\"; this type has attributes".to_owned(),
            );
        }
        (other, _) => {
            return unsupported(format!(
                "VM type {:?} is not supported yet: its launch is not written",
                other.as_str()
            ));
        }
    }
    let vm = KvmVm::new(kind.number().into(), views.end());
    let vm = vm.map_err(|errno| Error::Host {
        what: "create a VM",
        errno,
    })?;
    Ok((Arc::new(vm), mode))
}

/// Where one memslot must end and the next begin.
fn borders(memory: u64, parts: u32) -> Vec<u64> {
    let pages = memory / PAGE_SIZE;
    let parts = u64::from(parts);
    (1..parts).map(|part| pages * part / parts * PAGE_SIZE).collect()
}

fn set_up(failure: EnforceFailure) -> Error {
    match failure {
        EnforceFailure::NoSlots(out) => Error::NotSupported(format!(
            "this host has {} memslots and {} are needed: use fewer parts",
            out.available, out.needed
        )),
        EnforceFailure::Kernel { errno, .. } => Error::Host {
            what: "give the guest its memory",
            errno,
        },
    }
}
