//! What this host's /dev/kvm offers, and what is missing.

use std::fs::OpenOptions;
use std::io::ErrorKind;

use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, KVM_CAP_PRE_FAULT_MEMORY,
    KVM_CAP_VM_TYPES, KVM_MAX_CPUID_ENTRIES, KVM_MEMORY_ATTRIBUTE_PRIVATE,
};
use kvm_ioctls::Kvm;

use super::hypercall::KVM_HC_MAP_GPA_RANGE;
use super::kvm::CAP_GUEST_MEMFD_FLAGS;
use crate::errno::Errno;
use crate::error::Error;

const DEVICE: &str = "/dev/kvm";
const KVM_API_VERSION: i32 = kvm_bindings::KVM_API_VERSION as i32;
/// Ends a sentence on what this host's /dev/kvm lacks.
const TESTBED: &str = "`pagegate testbed -- COMMAND` runs a command in a machine that has one";

/// A VM type of KVM on x86 (KVM_CREATE_VM's argument).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmType {
    /// An ordinary VM.
    Default,
    /// KVM_X86_SW_PROTECTED_VM: private memory without hardware.
    SwProtected,
    /// AMD SEV.
    Sev,
    /// AMD SEV-ES.
    SevEs,
    /// AMD SEV-SNP.
    Snp,
    /// Intel TDX.
    Tdx,
}

impl VmType {
    /// All of them, in the order of their numbers.
    pub const ALL: [VmType; 6] = [
        VmType::Default,
        VmType::SwProtected,
        VmType::Sev,
        VmType::SevEs,
        VmType::Snp,
        VmType::Tdx,
    ];

    /// Its name in messages and Python.
    pub fn as_str(self) -> &'static str {
        match self {
            VmType::Default => "default",
            VmType::SwProtected => "sw-protected",
            VmType::Sev => "sev",
            VmType::SevEs => "sev-es",
            VmType::Snp => "snp",
            VmType::Tdx => "tdx",
        }
    }

    /// KVM's number for it.
    pub fn number(self) -> u32 {
        self as u32
    }
}

/// How KVM is made to enforce the states of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnforcementMode {
    /// KVM_SET_MEMORY_ATTRIBUTES, with memslots that have a guest_memfd.
    Attributes,
    /// KVM_SET_MEMORY_ATTRIBUTES on the view that a page is not in, with a memslot for each view and no guest_memfd.
    Traps,
    /// The memslot of a page is replaced: one over the shared side's memory by one over the private side's, and back.
    Memslots,
}

impl EnforcementMode {
    /// All of them.
    pub const ALL: [EnforcementMode; 3] = [
        EnforcementMode::Attributes,
        EnforcementMode::Traps,
        EnforcementMode::Memslots,
    ];

    /// "attributes", "traps" or "memslots".
    pub const fn as_str(self) -> &'static str {
        match self {
            EnforcementMode::Attributes => "attributes",
            EnforcementMode::Traps => "traps",
            EnforcementMode::Memslots => "memslots",
        }
    }
}

/// What /dev/kvm offers, as far as this project uses it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// The VM types (KVM_CAP_VM_TYPES).
    pub vm_types: Vec<VmType>,
    /// The memory attributes of a VM with private memory (KVM_CAP_MEMORY_ATTRIBUTES): PRIVATE is 8, 0 means none.
    pub memory_attributes: u64,
    /// Whether a VM can have a guest_memfd (KVM_CAP_GUEST_MEMFD).
    pub guest_memfd: bool,
    /// KVM_CAP_GUEST_MEMFD_FLAGS: MMAP is 1, INIT_SHARED is 2; 0 where the capability is unknown.
    pub guest_memfd_flags: u64,
    /// Whether KVM_HC_MAP_GPA_RANGE can exit to user space (KVM_CAP_EXIT_HYPERCALL).
    pub exit_hypercall: bool,
    /// Whether vCPUs have KVM_PRE_FAULT_MEMORY (KVM_CAP_PRE_FAULT_MEMORY).
    pub pre_fault: bool,
    /// The most vCPUs of a VM (KVM_CAP_MAX_VCPUS).
    pub max_vcpus: u32,
    /// The most memslots of a VM (KVM_CAP_NR_MEMSLOTS).
    pub max_memslots: u32,
    /// What `enforcement="auto"` chooses; `None` where no VM can be created.
    pub enforcement: Option<EnforcementMode>,
    /// What is missing, a sentence each, with what to do about it.
    pub problems: Vec<String>,
}

/// Opens /dev/kvm.
///
/// # Errors
/// `KvmUnavailable` with what to do about it.
pub fn open() -> Result<Kvm, Error> {
    // The file first: its error says what is wrong, which kvm-ioctls' does not.
    let opened = OpenOptions::new().read(true).write(true).open(DEVICE);
    let unavailable = |why: String| Err(Error::KvmUnavailable(why));
    let opened = opened.map(drop).map_err(|error| (error.kind(), error));
    match opened.map(|()| Kvm::new()) {
        Ok(Ok(kvm)) if kvm.get_api_version() == KVM_API_VERSION => Ok(kvm),
        Ok(Ok(_)) => unavailable(format!(
            "{DEVICE} is not KVM, or not API version {KVM_API_VERSION}; {TESTBED}"
        )),
        Ok(Err(error)) => unavailable(format!("{DEVICE} cannot be opened: {error}")),
        Err((ErrorKind::NotFound, _)) => unavailable(format!(
            "{DEVICE} does not exist: load kvm_intel or kvm_amd and turn virtualisation on in the firmware (in a VM: \
             nested virtualisation), or {TESTBED}"
        )),
        Err((ErrorKind::PermissionDenied, _)) => unavailable(format!(
            "{DEVICE} may not be opened: join its group (`sudo usermod -aG kvm $USER`, then log in again)"
        )),
        Err((_, error)) => unavailable(format!("{DEVICE} cannot be opened: {error}")),
    }
}

/// KVM_GET_SUPPORTED_CPUID.
///
/// # Errors
/// The kernel's.
pub(crate) fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, Errno> {
    Ok(kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)
}

/// Queries this host. Never fails: what is missing is in `problems`.
pub fn probe() -> Host {
    match open() {
        Ok(kvm) => query(&kvm),
        Err(error) => Host {
            problems: vec![error.to_string()],
            ..Host::default()
        },
    }
}

fn query(kvm: &Kvm) -> Host {
    let cap = |number: u32| kvm.check_extension_raw(number.into()).max(0);
    let types = cap(KVM_CAP_VM_TYPES) | 1;
    let vm_types: Vec<VmType> = VmType::ALL
        .into_iter()
        .filter(|kind| types & (1 << kind.number()) != 0)
        .collect();
    let protected = vm_types.contains(&VmType::SwProtected);
    let kind = if protected {
        VmType::SwProtected
    } else {
        VmType::Default
    };
    let mut host = Host {
        vm_types,
        exit_hypercall: cap(KVM_CAP_EXIT_HYPERCALL) & (1 << KVM_HC_MAP_GPA_RANGE) != 0,
        pre_fault: cap(KVM_CAP_PRE_FAULT_MEMORY) > 0,
        max_vcpus: kvm.get_max_vcpus() as u32,
        max_memslots: kvm.get_nr_memslots() as u32,
        ..Host::default()
    };
    // These capabilities are those of a VM: they differ by its type.
    match kvm.create_vm_with_type(kind.number().into()) {
        Ok(vm) => {
            let cap = |number: u32| vm.check_extension_raw(number.into()).max(0);
            host.memory_attributes = cap(KVM_CAP_MEMORY_ATTRIBUTES) as u64;
            host.guest_memfd = cap(KVM_CAP_GUEST_MEMFD) > 0;
            host.guest_memfd_flags = cap(CAP_GUEST_MEMFD_FLAGS) as u64;
            let attributes = host.memory_attributes & u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) != 0;
            host.enforcement = Some(match protected && attributes && host.guest_memfd {
                true => EnforcementMode::Attributes,
                false => EnforcementMode::Memslots,
            });
        }
        Err(error) => host.problems.push(format!(
            "{DEVICE} creates no VM ({error}): another hypervisor may be using the CPU's virtualisation; {TESTBED}"
        )),
    }
    if host.enforcement == Some(EnforcementMode::Memslots) {
        host.problems.push(format!(
            "no VM type with private memory, so states are enforced by memslots: attributes need a kernel built with \
             CONFIG_KVM_SW_PROTECTED_VM; {TESTBED}"
        ));
        if !host.guest_memfd {
            host.problems.push(
                "no guest_memfd for ordinary VMs, so private pages are host memory that pagegate refuses to read or \
                 write: Linux 6.18 or later has it"
                    .to_owned(),
            );
        }
    }
    if !host.exit_hypercall {
        host.problems.push(
            "KVM_HC_MAP_GPA_RANGE cannot exit to user space: guests ask through the doorbell port instead; Linux 5.16 \
             or later has it"
                .to_owned(),
        );
    }
    host
}
