//! A machine's parameters, and their checks against each other and against the host.

use std::sync::Arc;

use kvm_bindings::CpuId;

use crate::errno::Errno;
use crate::error::Error;
use crate::hypervisor::host::{self, EnforcementMode, VmType};
use crate::hypervisor::vm::Hypervisor;
use crate::memory::address::{PAGE_SIZE, Range, State};
use crate::memory::missing::pager::Pager;
use crate::memory::views::{PHYSICAL_END, ViewBit, Views};
use crate::policy::hooks::Policy;
use crate::x86::cpuid;
use crate::x86::sev::SoftwareSev;

/// The most events that a log keeps: more than a host has memory for.
const MOST_EVENTS: usize = 1 << 32;

/// Called in each vCPU's thread with the thread's body, which it runs. A binding prepares there what its callbacks
/// need.
pub type ThreadWrapper = Arc<dyn Fn(&mut (dyn FnMut() + Send)) + Send + Sync>;

/// What is around the vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Platform {
    /// Nothing: no interrupts, and a HLT ends the vCPU.
    #[default]
    Bare,
    /// What Linux needs: interrupt controllers and a timer in the kernel, ACPI, COM1, and a hole below 4 GiB.
    Pc,
}

/// What a guest is made to believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confidential {
    /// Software SEV: see [`crate::x86::sev`].
    Sev,
}

/// A machine's parameters.
pub struct Config {
    /// Bytes of guest memory, from gpa 0 on; a multiple of 4096.
    pub memory: u64,
    /// How many vCPUs.
    pub vcpus: u32,
    /// `None`: the one that `enforcement` needs.
    pub vm_type: Option<VmType>,
    /// `None`: the first that the host has and the guest can live with.
    pub enforcement: Option<EnforcementMode>,
    /// The bit of a guest-physical address that means the shared view.
    pub shared_bit: Option<u32>,
    /// The bit of a guest-physical address that means the private view.
    pub private_bit: Option<u32>,
    /// The state of all pages at first.
    pub initial: State,
    /// What is around the vCPUs.
    pub platform: Platform,
    /// `None` for an ordinary guest.
    pub confidential: Option<Confidential>,
    /// The host may read and write private pages that are host memory.
    pub debug_private: bool,
    /// The private side is host memory also where the VM can have a guest_memfd: a page of a guest_memfd cannot come when it is
    /// touched.
    pub host_memory: bool,
    /// All pages are missing at first, and this gives them their bytes. It needs `host_memory`.
    pub pager: Option<Arc<dyn Pager>>,
    /// How many events the log keeps, 2^32 at most.
    pub events: usize,
    /// Memory is divided into this many equal parts, and no memslot crosses from one to the next.
    pub memslots: u32,
    /// The policy that judges its requests at first.
    pub policy: Arc<dyn Policy>,
    /// Called around each vCPU thread's body.
    pub around: Option<ThreadWrapper>,
    /// Bytes of stack of each vCPU thread; `None`: what threads have that C programs start.
    pub stack: Option<usize>,
    /// Used in place of /dev/kvm.
    pub hypervisor: Option<Arc<dyn Hypervisor>>,
}

/// The largest memslot in bytes, where conversions replace memslots.
const LARGEST_SLOT: u64 = 1 << 30;
/// Where a PC has no memory: its devices are there.
const HOLE: (u64, u64) = (3 << 30, 1 << 30);
/// The highest bit that a view bit can be: KVM's gpas have at most 52.
const HIGHEST_VIEW_BIT: u32 = 51;

fn invalid<T>(why: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid(why.into()))
}

impl Config {
    /// One vCPU, all pages shared at first and nothing around it; KVM's own limits and /dev/kvm.
    pub fn new(memory: u64, policy: Arc<dyn Policy>) -> Self {
        Self {
            memory,
            vcpus: 1,
            vm_type: None,
            enforcement: None,
            shared_bit: None,
            private_bit: None,
            initial: State::Shared,
            platform: Platform::Bare,
            confidential: None,
            debug_private: false,
            host_memory: false,
            pager: None,
            events: 0,
            memslots: 1,
            policy,
            around: None,
            stack: None,
            hypervisor: None,
        }
    }

    /// Where memory ends: a PC's has a hole.
    ///
    /// # Errors
    /// `Invalid` for an argument.
    pub fn memory_end(&self) -> Result<u64, Error> {
        Ok(self.views()?.memory_end())
    }

    /// Checks what can be checked without the host, and lays out memory.
    pub(super) fn views(&self) -> Result<Views, Error> {
        let memory = self.memory;
        if memory == 0 || memory > PHYSICAL_END || !memory.is_multiple_of(PAGE_SIZE) {
            return invalid(format!(
                "memory is {memory:#x} bytes: it must be a multiple of 4096, from 4096 to 1 << 52 (4 PiB)"
            ));
        }
        if self.vcpus == 0 {
            return invalid("vcpus is 0: a machine needs at least one vCPU");
        }
        if self.events > MOST_EVENTS {
            return invalid(format!("events is {}: it must be at most {MOST_EVENTS}", self.events));
        }
        if self.memslots == 0 || u64::from(self.memslots) > memory / PAGE_SIZE {
            return invalid(format!(
                "memslots={} must be at least 1 and at most the number of pages",
                self.memslots
            ));
        }
        self.check_confidential()?;
        let (end, hole) = self.layout();
        let bit = self.view_bit()?;
        if let Some(ViewBit { bit, set }) = bit
            && (bit > HIGHEST_VIEW_BIT || end > 1 << bit)
        {
            return invalid(format!(
                "{set}_bit={bit} must lie above all of memory (which ends at {end:#x}) and below bit 52"
            ));
        }
        Ok(Views::new(end, hole, bit))
    }

    fn check_confidential(&self) -> Result<(), Error> {
        if self.confidential.is_none() {
            return Ok(());
        }
        if self.platform == Platform::Bare {
            return invalid("confidential=\"sev\" is for Linux: it needs platform=\"pc\"");
        }
        if self.shared_bit.is_some() {
            return invalid("a SEV guest has a private_bit, the C-bit, and no shared_bit");
        }
        match self.initial {
            State::Private => Ok(()),
            State::Shared => invalid("everything is private at first in a SEV guest: leave out initial=\"shared\""),
        }
    }

    /// Where memory ends, and its hole.
    fn layout(&self) -> (u64, Option<Range>) {
        let (start, size) = HOLE;
        match self.platform {
            Platform::Pc if self.memory > start => (self.memory + size, Range::new(start, size)),
            _ => (self.memory, None),
        }
    }

    fn view_bit(&self) -> Result<Option<ViewBit>, Error> {
        let of = |bit, set| Some(ViewBit { bit, set });
        Ok(match (self.shared_bit, self.private_bit) {
            (Some(_), Some(_)) => return invalid("shared_bit and private_bit exclude each other: name one"),
            (Some(bit), None) => of(bit, State::Shared),
            (None, Some(bit)) => of(bit, State::Private),
            (None, None) if self.confidential.is_some() => of(self.physical_bits()? - 1, State::Private),
            (None, None) => None,
        })
    }

    /// The width of a guest-physical address.
    fn physical_bits(&self) -> Result<u32, Error> {
        let what = "ask for the CPUID that KVM supports";
        let failed = |errno| Error::Host { what, errno };
        let cpuid = match &self.hypervisor {
            Some(hypervisor) => hypervisor.supported_cpuid(),
            None => host::supported_cpuid(&host::open()?),
        };
        Ok(cpuid::physical_bits(&cpuid.map_err(failed)?))
    }

    /// The profile of a software SEV guest.
    pub(super) fn sev(&self, views: &Views) -> Option<SoftwareSev> {
        let Confidential::Sev = self.confidential?;
        Some(SoftwareSev {
            private_bit: views.mask().trailing_zeros(),
        })
    }

    /// What all vCPUs' CPUID has in common, made from what KVM supports.
    pub(super) fn cpuid(&self, supported: CpuId, sev: Option<SoftwareSev>) -> Result<CpuId, Errno> {
        let cpuid = match self.platform {
            Platform::Bare => supported,
            Platform::Pc => cpuid::of_pc(&supported, self.vcpus)?,
        };
        match sev {
            Some(sev) => sev.cpuid(&cpuid),
            None => Ok(cpuid),
        }
    }

    /// The addresses that no memslot crosses: one ends there and the next begins.
    pub(super) fn borders(&self, mode: EnforcementMode, views: &Views) -> Vec<u64> {
        let pages = self.memory / PAGE_SIZE;
        let parts = u64::from(self.memslots);
        let mut borders: Vec<u64> = (1..parts).map(|part| pages * part / parts * PAGE_SIZE).collect();
        if mode == EnforcementMode::Memslots && (views.split() || self.platform == Platform::Bare) {
            // Where KVM shadows page tables, the cost of creating a memslot grows with its size.
            borders.extend((1..views.memory_end().div_ceil(LARGEST_SLOT)).map(|part| part * LARGEST_SLOT));
            borders.sort_unstable();
            borders.dedup();
        }
        borders
    }
}
