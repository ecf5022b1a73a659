//! A virtual machine: memory, vCPUs, devices, the policy in place and the log.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;

use parking_lot::Mutex;

use super::choice::{self, Chosen};
use super::config::{Config, Platform, ThreadWrapper};
use super::current::Current;
use super::pc::Pc;
use super::snapshot::manifest::Made;
use crate::clock::monotonic;
use crate::devices::bus::{Bus, IoHandler, MmioHandler};
use crate::devices::virtio::device::Device;
use crate::devices::virtio::run::{Accesses, Run, Spawn};
use crate::errno::Errno;
use crate::error::Error;
use crate::events::log::EventLog;
use crate::hypervisor::host::EnforcementMode;
use crate::hypervisor::vm::Hypervisor;
use crate::input::Watch;
use crate::memory::address::State;
use crate::memory::backing::Backing;
use crate::memory::conversion::Converted;
use crate::memory::guest_memory::{GuestMemory, Layout, NoAccess, Resident, Seal};
use crate::memory::listeners::{self, Listener};
use crate::policy::current::CurrentPolicy;
use crate::policy::hooks::Policy;
use crate::policy::knowledge::Knowledge;
use crate::vcpu::control::Control;
use crate::vcpu::kick::Kick;
use crate::vcpu::running::Context;
use crate::vcpu::state::VcpuState;
use crate::x86::cpuid;
use crate::x86::registers::MTRRS_ON;
use crate::x86::sev::{SEV_STATUS, SoftwareSev};

/// A virtual machine.
pub struct Machine {
    pub(super) vcpus: Vec<Mutex<VcpuState>>,
    /// One for each vCPU. Not under the vCPU's mutex, which its thread holds for the whole run.
    pub(super) kicks: Vec<Arc<Kick>>,
    policy: Arc<CurrentPolicy>,
    bus: Bus,
    events: Arc<EventLog>,
    /// The run in progress.
    pub(super) current: Arc<Current>,
    /// Called around each vCPU thread's body.
    pub(super) around: Option<ThreadWrapper>,
    /// Bytes of stack of each vCPU thread.
    pub(super) stack: Option<usize>,
    /// Of the last run that failed.
    /// Whether vCPUs can map a GiB as one page.
    pub(super) gib_pages: bool,
    /// Whether vCPUs have KVM_PRE_FAULT_MEMORY.
    pre_fault: bool,
    /// The devices of `platform="pc"`.
    pub(super) pc: Option<Pc>,
    pub(super) sev: Option<SoftwareSev>,
    /// Whether the host may read and write private pages.
    debug_private: bool,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    /// Gives missing pages their bytes, if there ever were any.
    pub(super) pager_thread: Mutex<Option<JoinHandle<()>>>,
    /// Whether they come from elsewhere than from a snapshot.
    pub(super) own_pager: AtomicBool,
    /// For a snapshot: what it was made with.
    pub(super) made: Made,
    /// Last, so that it is dropped after the vCPUs: it holds the memory of the VM's memslots.
    pub(super) memory: Arc<GuestMemory>,
}

impl Machine {
    /// Creates the VM, its memory and its vCPUs.
    ///
    /// # Errors
    /// `KvmUnavailable`, `NotSupported`, `Invalid` for an argument, `Host` for a system call that failed.
    pub fn new(config: Config) -> Result<Self, Error> {
        Self::new_watched(config, &mut || Ok(()))
    }

    /// The same. `watch` is called again and again: with a large memory KVM may take seconds for its memslots.
    ///
    /// # Errors
    /// As [`Machine::new`], and `Interrupted` for a failure of `watch`.
    pub fn new_watched(config: Config, watch: &mut Watch<'_>) -> Result<Self, Error> {
        let views = config.views()?;
        let chosen = choice::choose(&config, &views)?;
        let Chosen {
            hypervisor,
            mode,
            cpuid: supported,
        } = chosen;
        let sev = config.sev(&views);
        let made = Made::of(&config, mode, &views);
        if config.platform == Platform::Pc {
            let what = "create the interrupt controllers";
            let created = hypervisor.create_interrupt_controllers();
            created.map_err(|errno| Error::Host { what, errno })?;
        }
        if sev.is_some() {
            let what = "have KVM leave the MSR SEV_STATUS to this process";
            let taken = hypervisor.take_msr(SEV_STATUS);
            taken.map_err(|errno| Error::Host { what, errno })?;
        }
        let layout = Layout {
            views,
            initial: config.initial,
            mode,
            borders: config.borders(mode, &views),
            host_memory: config.host_memory || mode == EnforcementMode::Traps || config.platform == Platform::Pc,
            vcpus: config.vcpus as usize,
        };
        let memory = GuestMemory::new(hypervisor.clone(), layout, watch)?;
        let (events, writers) = EventLog::new(config.events, config.vcpus as usize);
        let what = "create a vCPU";
        let failed = |errno| Error::Host { what, errno };
        let cpuid = config.cpuid(supported, sev).map_err(failed)?;
        let vcpu = |(index, log)| -> Result<VcpuState, Errno> {
            let mut hv = hypervisor.create_vcpu(index)?;
            hv.set_cpuid(&cpuid::of_vcpu(&cpuid, index))?;
            if config.platform == Platform::Pc {
                hv.set_msrs(&[MTRRS_ON])?;
            }
            VcpuState::new(index, hv, log)
        };
        let vcpus = (0..config.vcpus).zip(writers).map(vcpu);
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let kick = |vcpu: &VcpuState| Arc::new(Kick::new(vcpu.hv.immediate_exit()));
        let kicks: Vec<Arc<Kick>> = vcpus.iter().map(kick).collect();
        if let Some(pause) = memory.pause() {
            let kicks = kicks.clone();
            pause.set_kick_all(Box::new(move || kicks.iter().for_each(|kick| kick.kick())));
        }
        let (bus, current) = (Bus::default(), Arc::new(Current::default()));
        let pc = match config.platform {
            Platform::Pc => Some(Pc::new(&hypervisor, &bus, &current)?),
            Platform::Bare => None,
        };
        let machine = Self {
            vcpus: vcpus.into_iter().map(Mutex::new).collect(),
            kicks,
            policy: Arc::new(CurrentPolicy::new(config.policy)),
            bus,
            events: Arc::new(events),
            current,
            around: config.around,
            stack: config.stack,
            gib_pages: cpuid::gib_pages(&cpuid),
            pre_fault: hypervisor.capabilities().pre_fault,
            pc,
            sev,
            made,
            pager_thread: Mutex::new(None),
            own_pager: AtomicBool::new(false),
            hypervisor,
            debug_private: config.debug_private,
            memory: Arc::new(memory),
        };
        if let Some(pager) = config.pager {
            machine.begin_all_missing(pager)?;
        }
        Ok(machine)
    }

    /// Guest memory, with the state of each page.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How KVM is made to enforce page states.
    pub fn enforcement(&self) -> EnforcementMode {
        self.memory.mode()
    }

    /// How many vCPUs.
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    /// The log of its requests.
    pub fn events(&self) -> &Arc<EventLog> {
        &self.events
    }

    /// What the policies know that ask others.
    pub(super) fn policy_knows(&self) -> Vec<Option<Knowledge>> {
        let mut known = Vec::new();
        self.policy.present().tell(monotonic(), &mut known);
        known
    }

    /// Has them know that.
    pub(super) fn remind_policy(&self, known: &[Option<Knowledge>]) {
        self.policy.present().recall(monotonic(), known);
    }

    /// Replaces the policy. Requests that come after the return are put to the new one; a request that the old one is
    /// judging now gets the old one's answer.
    pub fn replace_policy(&self, policy: Arc<dyn Policy>) {
        drop(self.policy.replace(policy));
    }

    /// What the loops of its vCPUs need from it.
    pub(super) fn context<'a>(&'a self, control: &'a Control) -> Context<'a> {
        Context {
            memory: &self.memory,
            bus: &self.bus,
            policy: &self.policy,
            events: &self.events,
            control,
            pre_fault: self.pre_fault,
            sev: self.sev,
            is_pc: self.pc.is_some(),
        }
    }

    pub(super) fn kick(&self, vcpu: u32) -> &Kick {
        &self.kicks[vcpu as usize]
    }

    /// Registers a handler of a port.
    ///
    /// # Errors
    /// `Invalid` for the doorbell's port and for one that has a handler.
    pub fn on_io(&self, port: u16, handler: Arc<dyn IoHandler>) -> Result<(), Error> {
        self.bus.on_io(port, handler)
    }

    /// Registers a handler of an MMIO range.
    ///
    /// # Errors
    /// `Invalid` for a range that is empty, wraps, or overlaps memory, a view or another handler's.
    pub fn on_mmio(&self, gpa: u64, size: u64, handler: Arc<dyn MmioHandler>) -> Result<(), Error> {
        self.bus.on_mmio(gpa, size, self.memory.views(), handler)
    }

    /// Puts a virtio device on the PCI bus, before the machine boots. `name` is what events and messages call it. With
    /// `logs_accesses` each of its accesses to memory has an event.
    ///
    /// # Errors
    /// `Busy` on a bare platform, while it runs and once a kernel was booted; `Invalid` for a 32nd device and for queues that cannot be;
    /// `Host` where the host has no interrupts or descriptors left.
    pub fn add_device(&self, name: &str, device: Arc<dyn Device>, logs_accesses: bool) -> Result<(), Error> {
        outside_listeners()?;
        let pc = self.pc()?;
        self.current.changeable()?;
        if pc.kernel.lock().is_some() {
            return Err(Error::Busy(
                "this machine has booted already: add devices before boot()",
            ));
        }
        if pc.add(name, device, logs_accesses, &self.bus, self.memory.views())? {
            self.add_listener(pc.in_flight.clone())?;
        }
        Ok(())
    }

    /// Reads the configuration of the devices of this name again, and tells their drivers if it has changed.
    ///
    /// # Errors
    /// `Invalid` if there is none, or what it says is wrong; `Device` for one that raises.
    pub fn refresh_device(&self, name: &str) -> Result<(), Error> {
        outside_listeners()?;
        self.pc()?.refresh(name)
    }

    /// What the threads of its devices need from it.
    pub(super) fn devices_run(
        &self,
        pc: &Pc,
        control: Arc<Control>,
        accesses: &Arc<Accesses>,
        spawn: Arc<Spawn>,
    ) -> Run {
        let is_over = {
            let control = control.clone();
            Arc::new(move || control.leaving())
        };
        Run {
            is_over,
            spawn,
            memory: self.memory.clone(),
            policy: self.policy.clone(),
            events: self.events.clone(),
            in_flight: pc.in_flight.clone(),
            accesses: accesses.clone(),
            end: Arc::new(move |how| control.finish(how)),
        }
    }

    /// Tells a listener the present states, and from then on every conversion.
    ///
    /// # Errors
    /// `Busy` when called from a listener; the listener's own failure as `HostConversion`, and then it was not added.
    pub fn add_listener(&self, listener: Arc<dyn Listener>) -> Result<(), Error> {
        self.outside_callbacks()?;
        Ok(self.memory.join(listener)?)
    }

    /// Removes a listener. Returns whether it was there.
    pub fn remove_listener(&self, listener: &Arc<dyn Listener>) -> bool {
        self.memory.leave(listener)
    }

    /// Converts pages because the host wants it. The policy is not asked.
    ///
    /// # Errors
    /// As [`GuestMemory::convert`]; `Busy` when called from a listener.
    pub fn convert(&self, gpa: u64, size: u64, to: State) -> Result<Converted, Error> {
        self.outside_callbacks()?;
        self.in_its_process()?;
        Ok(self.memory.convert(gpa, size, to, false)?)
    }

    /// Whether its guest believes in SEV.
    pub fn is_confidential(&self) -> bool {
        self.sev.is_some()
    }

    /// Whether the host may read and write private pages, so that what it says of the guest's privacy does not hold.
    pub fn debug_private(&self) -> bool {
        self.debug_private
    }

    /// Copies bytes out of shared pages; with `debug_private` also out of private ones.
    ///
    /// # Errors
    /// `PrivateMemory` with the first private page; `Outside` for bytes outside of memory; `Host` where reading fails,
    /// as it does for a poisoned page; `Busy` when called from a listener.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), Error> {
        let len = into.len() as u64;
        self.touch(gpa, len, "read", |side, gpa, part| side.read(gpa, &mut into[part]))
    }

    /// Copies bytes into shared pages.
    ///
    /// # Errors
    /// As [`Machine::read`].
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<(), Error> {
        self.in_its_process()?;
        let len = from.len() as u64;
        self.touch(gpa, len, "write", |side, gpa, part| side.write(gpa, &from[part]))
    }

    /// Waits until the bytes that [`read`](Self::read) and [`write`](Self::write) may touch are there, if they are missing.
    /// Those do so, too, and cannot be interrupted.
    ///
    /// # Errors
    /// `Pager` where a pager fails; `Interrupted` for a failure of `watch`; `Busy` when called from a listener.
    pub fn bring(&self, gpa: u64, len: u64, watch: &mut Watch<'_>) -> Result<(), Error> {
        self.outside_callbacks()?;
        let pages = self.memory.pages(gpa & !self.memory.views().mask(), len);
        match (pages, self.memory.missing()) {
            (Some(pages), Some(missing)) if self.debug_private => {
                missing.bring(State::Shared, pages, watch)?;
                missing.bring(State::Private, pages, watch)
            }
            (Some(pages), Some(missing)) => missing.bring(State::Shared, pages, watch),
            _ => Ok(()),
        }
    }

    /// Fails in a child that was forked: the memory is its parent's guest's.
    fn in_its_process(&self) -> Result<(), Error> {
        match self.current.is_of_this_process() {
            true => Ok(()),
            false => Err(Error::Busy(
                "this machine is that of the process that this one was forked from: it can be read here, and not changed",
            )),
        }
    }

    /// Fails if the calling thread is inside a listener, or inside the pager of this machine.
    pub(super) fn outside_callbacks(&self) -> Result<(), Error> {
        match self.memory.missing().is_some_and(|missing| missing.is_calling()) {
            true => Err(Error::Busy(
                "a pager is called while somebody waits for its page: it must not convert, read or write the memory of this \
                 machine, nor run or close it",
            )),
            false => outside_listeners(),
        }
    }

    fn touch(
        &self,
        gpa: u64,
        len: u64,
        what: &'static str,
        mut access: impl FnMut(&Backing, u64, Range<usize>) -> Result<(), Errno>,
    ) -> Result<(), Error> {
        self.outside_callbacks()?;
        let gpa = gpa & !self.memory.views().mask();
        if len == 0 {
            return Ok(());
        }
        let seal = match self.debug_private {
            true => Seal::Broken,
            false => Seal::Whole,
        };
        let done = self.memory.on_bytes(gpa, len, seal, &mut access);
        done.map_err(|failure| match failure {
            NoAccess::Outside => Error::Outside {
                gpa,
                size: len,
                memory: self.memory.size(),
            },
            NoAccess::Private(gpa) if self.debug_private => Error::NotSupported(format!(
                "page {gpa:#x} is private and in a guest_memfd that the host cannot map: debug_private reaches host memory \
                 only, as enforcement=\"traps\" has it"
            )),
            NoAccess::Private(gpa) => Error::PrivateMemory { gpa, what },
            NoAccess::Failed(errno) => Error::Host {
                what: "access the guest's memory",
                errno,
            },
        })
    }

    /// How much host memory the guest occupies.
    ///
    /// # Errors
    /// `Host` where fstat(2) fails.
    pub fn resident(&self) -> Result<Resident, Error> {
        let what = "count resident memory";
        self.memory.resident().map_err(|errno| Error::Host { what, errno })
    }

    /// Closes it: no run and no conversion begins any more, and all handlers and listeners are dropped, which may hold
    /// references to the object that owns this machine. Waits for conversions under way; of a large one the parts that
    /// are left fail.
    ///
    /// # Errors
    /// `Busy` while it runs, and when called from a listener.
    pub fn close(&self) -> Result<(), Error> {
        self.outside_callbacks()?;
        self.current.close()?;
        self.memory.end_conversions();
        // A pager that hangs ends its thread when it returns.
        self.memory.end_missing();
        let _ = self.pager_has_ended();
        self.bus.clear();
        if let Some(pc) = &self.pc {
            pc.close();
        }
        Ok(())
    }
}

/// Fails if the calling thread is inside a listener.
pub(super) fn outside_listeners() -> Result<(), Error> {
    match listeners::inside() {
        true => Err(Error::Busy(
            "a listener is called with its pages locked: it must not convert, read or write guest memory, nor run or \
             close the machine",
        )),
        false => Ok(()),
    }
}
