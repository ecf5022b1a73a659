//! A virtual machine: memory, vCPUs, devices, the policy in place and the log.

use std::sync::Arc;

use parking_lot::Mutex;

use super::config::{Config, ThreadWrapper};
use crate::devices::bus::{Bus, IoHandler, MmioHandler};
use crate::errno::Errno;
use crate::error::{ConvertError, Error};
use crate::events::log::EventLog;
use crate::hypervisor::host::EnforcementMode;
use crate::memory::address::State;
use crate::memory::backing::Backing;
use crate::memory::conversion::Converted;
use crate::memory::guest_memory::{GuestMemory, Layout, Resident};
use crate::memory::listeners::{self, Listener};
use crate::policy::current::CurrentPolicy;
use crate::policy::hooks::Policy;
use crate::vcpu::control::Control;
use crate::vcpu::kick::Kick;
use crate::vcpu::running::Context;
use crate::vcpu::state::VcpuState;
use crate::x86::cpuid;

/// A virtual machine.
pub struct Machine {
    pub(super) vcpus: Vec<Mutex<VcpuState>>,
    /// One for each vCPU. Not under the vCPU's mutex, which its thread holds for the whole run.
    pub(super) kicks: Vec<Arc<Kick>>,
    policy: CurrentPolicy,
    bus: Bus,
    events: Arc<EventLog>,
    /// The run in progress.
    pub(super) current: Mutex<Option<Arc<Control>>>,
    /// Called around each vCPU thread's body.
    pub(super) around: Option<ThreadWrapper>,
    /// Whether vCPUs have KVM_PRE_FAULT_MEMORY.
    pre_fault: bool,
    /// Last, so that it is dropped after the vCPUs: it holds the memory of the VM's memslots.
    pub(super) memory: GuestMemory,
}

impl Machine {
    /// Creates the VM, its memory and its vCPUs.
    ///
    /// # Errors
    /// `KvmUnavailable`, `NotSupported`, `Invalid` for an argument, `Host` for a system call that failed.
    pub fn new(config: Config) -> Result<Self, Error> {
        let views = config.views()?;
        let (hypervisor, mode) = config.open(views)?;
        let layout = Layout {
            views,
            initial: config.initial,
            mode,
            borders: config.borders(mode),
            vcpus: config.vcpus as usize,
        };
        let memory = GuestMemory::new(hypervisor.clone(), layout)?;
        let (events, writers) = EventLog::new(config.events, config.vcpus as usize);
        let what = "create a vCPU";
        let failed = |errno| Error::Host { what, errno };
        let supported = hypervisor.supported_cpuid().map_err(failed)?;
        let vcpu = |(index, log)| -> Result<VcpuState, Errno> {
            let mut hv = hypervisor.create_vcpu(index)?;
            hv.set_cpuid(&cpuid::of_vcpu(&supported, index))?;
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
        Ok(Self {
            vcpus: vcpus.into_iter().map(Mutex::new).collect(),
            kicks,
            policy: CurrentPolicy::new(config.policy),
            bus: Bus::default(),
            events: Arc::new(events),
            current: Mutex::new(None),
            around: config.around,
            pre_fault: hypervisor.capabilities().pre_fault,
            memory,
        })
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
        self.bus.on_mmio(gpa, size, &self.memory.views(), handler)
    }

    /// Tells a listener the present states, and from then on every conversion.
    ///
    /// # Errors
    /// `Busy` when called from a listener; the listener's own failure as `HostConversion`, and then it was not added.
    pub fn add_listener(&self, listener: Arc<dyn Listener>) -> Result<(), Error> {
        outside_listeners()?;
        let failed = |failure| Error::HostConversion(ConvertError::Listener(failure));
        self.memory.join(listener).map_err(failed)
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
        outside_listeners()?;
        Ok(self.memory.convert(gpa, size, to, false)?)
    }

    /// Copies bytes out of shared pages.
    ///
    /// # Errors
    /// `PrivateMemory` with the first private page; `Outside` for bytes outside of memory; `Host` where reading fails,
    /// as it does for a poisoned page; `Busy` when called from a listener.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> Result<(), Error> {
        let len = into.len() as u64;
        self.touch(gpa, len, "read", |shared, gpa| shared.read(gpa, into))
    }

    /// Copies bytes into shared pages.
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
        access: impl FnOnce(&Backing, u64) -> Result<(), Errno>,
    ) -> Result<(), Error> {
        outside_listeners()?;
        let gpa = gpa & !self.memory.views().shared_mask();
        if len == 0 {
            return Ok(());
        }
        let (size, memory) = (len, self.memory.size());
        let outside = |_| Error::Outside { gpa, size, memory };
        let done = self.memory.on_shared(gpa, len, |shared| access(shared, gpa));
        match done.map_err(outside)? {
            Ok(done) => done.map_err(|errno| Error::Host {
                what: "access the guest's shared memory",
                errno,
            }),
            Err(gpa) => Err(Error::PrivateMemory { gpa, what }),
        }
    }

    /// How much host memory the guest occupies.
    ///
    /// # Errors
    /// `Host` where fstat(2) fails.
    pub fn resident(&self) -> Result<Resident, Error> {
        let what = "count resident memory";
        self.memory.resident().map_err(|errno| Error::Host { what, errno })
    }

    /// Drops all handlers and listeners: they may hold references to the object that owns this machine.
    pub fn clear_handlers(&self) {
        self.memory.clear_listeners();
        self.bus.clear();
    }
}

/// Fails if the calling thread is inside a listener.
pub(super) fn outside_listeners() -> Result<(), Error> {
    match listeners::inside() {
        true => Err(Error::Busy(
            "a listener is called with its pages locked: it must not convert, read or write guest memory, nor run the \
             machine",
        )),
        false => Ok(()),
    }
}
