//! A machine's parameters, and their checks against each other and against the host.

use std::sync::Arc;

use crate::error::Error;
use crate::hypervisor::host::{self, EnforcementMode, VmType};
use crate::hypervisor::kvm::KvmVm;
use crate::hypervisor::vm::{Capabilities, Hypervisor};
use crate::memory::address::{PAGE_SIZE, State};
use crate::memory::views::Views;
use crate::policy::hooks::Policy;
use crate::x86::cpuid;

/// Called in each vCPU's thread with the thread's body, which it runs. A binding prepares there what its callbacks
/// need.
pub type ThreadWrapper = Arc<dyn Fn(&mut (dyn FnMut() + Send)) + Send + Sync>;

/// A machine's parameters.
pub struct Config {
    /// Bytes of guest memory, from gpa 0 on; a multiple of 4096.
    pub memory: u64,
    /// How many vCPUs.
    pub vcpus: u32,
    /// `None`: the one that `enforcement` needs.
    pub vm_type: Option<VmType>,
    /// `None`: attributes where the host has them, else memslots.
    pub enforcement: Option<EnforcementMode>,
    /// The bit of a guest-physical address that means the shared view.
    pub shared_bit: Option<u32>,
    /// The state of all pages at first.
    pub initial: State,
    /// How many events the log keeps.
    pub events: usize,
    /// Memory is divided into this many equal parts, and no memslot crosses from one to the next.
    pub memslots: u32,
    /// The policy that judges its requests at first.
    pub policy: Arc<dyn Policy>,
    /// Called around each vCPU thread's body.
    pub around: Option<ThreadWrapper>,
    /// Used in place of /dev/kvm.
    pub hypervisor: Option<Arc<dyn Hypervisor>>,
}

/// The largest memslot in bytes, where conversions replace memslots.
const LARGEST_SLOT: u64 = 1 << 30;

impl Config {
    /// Checks what can be checked without the host, and lays out memory.
    pub(super) fn views(&self) -> Result<Views, Error> {
        let invalid = |why: String| Err(Error::Invalid(why));
        let memory = self.memory;
        if memory == 0 || !memory.is_multiple_of(PAGE_SIZE) || memory > 1 << 52 {
            return invalid(format!(
                "memory is {memory:#x} bytes: it must be a positive multiple of 4096"
            ));
        }
        if self.vcpus == 0 {
            return invalid("a machine needs at least one vCPU".to_owned());
        }
        if let Some(bit) = self.shared_bit
            && (bit > 51 || memory > 1 << bit)
        {
            return invalid(format!(
                "shared_bit={bit} must lie above all of memory ({memory:#x} bytes) and below bit 52"
            ));
        }
        if self.memslots == 0 || u64::from(self.memslots) > memory / PAGE_SIZE {
            return invalid(format!(
                "memslots={} must be at least 1 and at most the number of pages",
                self.memslots
            ));
        }
        Ok(Views::new(memory, self.shared_bit))
    }

    /// The hypervisor, opened and checked against the parameters, and how it is made to enforce page states.
    pub(super) fn open(&self, views: Views) -> Result<(Arc<dyn Hypervisor>, EnforcementMode), Error> {
        let (hypervisor, mode) = match &self.hypervisor {
            Some(hypervisor) => (hypervisor.clone(), self.mode_of(hypervisor.capabilities())),
            None => self.open_kvm(views)?,
        };
        let what = "ask for the CPUID that KVM supports";
        let cpuid = hypervisor.supported_cpuid();
        let bits = cpuid::physical_bits(&cpuid.map_err(|errno| Error::Host { what, errno })?);
        if views.end() > 1 << bits {
            let message = format!(
                "guest-physical addresses have {bits} bits here, and memory with its views ends at {:#x}; use less \
                 memory or a lower shared_bit",
                views.end()
            );
            return Err(Error::NotSupported(message));
        }
        let vcpus = hypervisor.capabilities().vcpus;
        if self.vcpus > vcpus {
            return Err(Error::NotSupported(format!("this host allows {vcpus} vCPUs")));
        }
        Ok((hypervisor, mode))
    }

    fn mode_of(&self, can: Capabilities) -> EnforcementMode {
        self.enforcement.unwrap_or(match can.private_attribute {
            true => EnforcementMode::Attributes,
            false => EnforcementMode::Memslots,
        })
    }

    fn open_kvm(&self, views: Views) -> Result<(Arc<dyn Hypervisor>, EnforcementMode), Error> {
        host::open()?;
        let host = host::probe();
        let native = host.enforcement.unwrap_or(EnforcementMode::Memslots);
        let mode = self.enforcement.unwrap_or(match self.vm_type {
            Some(VmType::Default) => EnforcementMode::Memslots,
            _ => native,
        });
        let kind = self.vm_type.unwrap_or(match mode {
            EnforcementMode::Attributes => VmType::SwProtected,
            EnforcementMode::Memslots => VmType::Default,
        });
        if !host.vm_types.contains(&kind) {
            return Err(no_such_type(kind, &host.vm_types));
        }
        check_type(kind, mode)?;
        let vm = KvmVm::new(kind.number().into(), views.end());
        let vm = vm.map_err(|errno| Error::Host {
            what: "create a VM",
            errno,
        })?;
        Ok((Arc::new(vm), mode))
    }

    /// The addresses that no memslot crosses: one ends there and the next begins.
    pub(super) fn borders(&self, mode: EnforcementMode) -> Vec<u64> {
        let pages = self.memory / PAGE_SIZE;
        let parts = u64::from(self.memslots);
        let mut borders: Vec<u64> = (1..parts).map(|part| pages * part / parts * PAGE_SIZE).collect();
        if mode == EnforcementMode::Memslots {
            // Where KVM shadows page tables, the cost of creating a memslot grows with its size.
            borders.extend((1..self.memory.div_ceil(LARGEST_SLOT)).map(|part| part * LARGEST_SLOT));
            borders.sort_unstable();
            borders.dedup();
        }
        borders
    }
}

fn no_such_type(kind: VmType, known: &[VmType]) -> Error {
    let names: Vec<&str> = known.iter().map(|kind| kind.as_str()).collect();
    let remedy = match kind {
        VmType::SwProtected => {
            "; a kernel with CONFIG_KVM_SW_PROTECTED_VM has it, and `pagegate testbed -- COMMAND` runs a command on one"
        }
        _ => "; it needs hardware that has it, and pagegate cannot launch it yet",
    };
    let (kind, names) = (kind.as_str(), names.join(", "));
    Error::NotSupported(format!("this host has no VM type {kind:?}, only {names}{remedy}"))
}

fn check_type(kind: VmType, mode: EnforcementMode) -> Result<(), Error> {
    let unsupported = |why: String| Err(Error::NotSupported(why));
    match (kind, mode) {
        (VmType::Default, EnforcementMode::Memslots) | (VmType::SwProtected, EnforcementMode::Attributes) => Ok(()),
        (VmType::Default, EnforcementMode::Attributes) => unsupported(
            "enforcement=\"attributes\" needs a VM type with private memory; \"default\" has none".to_owned(),
        ),
        (VmType::SwProtected, EnforcementMode::Memslots) => {
            unsupported("enforcement=\"memslots\" is for vm_type=\"default\"; this type has attributes".to_owned())
        }
        (other, _) => unsupported(format!(
            "VM type {:?} is not supported yet: pagegate cannot launch it",
            other.as_str()
        )),
    }
}
