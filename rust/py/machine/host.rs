//! What this host offers.

use pagegate_core::hypervisor::host::{EnforcementMode, Host};
use pyo3::prelude::*;

/// What /dev/kvm on this host offers, as far as pagegate uses it.
#[pyclass(name = "Host", module = "pagegate", frozen, get_all)]
pub(crate) struct PyHost {
    /// Types that a VM can have (KVM_CAP_VM_TYPES): "default", "sw-protected", "sev", "sev-es", "snp", "tdx".
    vm_types: Vec<&'static str>,
    /// What KVM_SET_MEMORY_ATTRIBUTES accepts, a mask: PRIVATE is 8; 0 without private memory.
    ///
    /// Asked of a VM of the type with private memory (KVM_CAP_MEMORY_ATTRIBUTES).
    memory_attributes: u64,
    /// Whether a guest_memfd can be created (KVM_CAP_GUEST_MEMFD).
    guest_memfd: bool,
    /// Flags that a guest_memfd can have (KVM_CAP_GUEST_MEMFD_FLAGS): MMAP is 1, INIT_SHARED is 2.
    guest_memfd_flags: u64,
    /// Whether KVM_HC_MAP_GPA_RANGE can exit to user space (KVM_CAP_EXIT_HYPERCALL).
    exit_hypercall: bool,
    /// Whether there is KVM_PRE_FAULT_MEMORY (KVM_CAP_PRE_FAULT_MEMORY).
    pre_fault: bool,
    /// vCPUs that a VM can have (KVM_CAP_MAX_VCPUS).
    max_vcpus: u32,
    /// Memslots that a VM can have (KVM_CAP_NR_MEMSLOTS).
    max_memslots: u32,
    /// What ``enforcement="auto"`` selects; ``None`` if no VM can be created.
    enforcement: Option<&'static str>,
    /// What is missing, one sentence each, with what to do about it.
    problems: Vec<String>,
}

impl From<Host> for PyHost {
    fn from(host: Host) -> Self {
        Self {
            vm_types: host.vm_types.iter().map(|kind| kind.as_str()).collect(),
            memory_attributes: host.memory_attributes,
            guest_memfd: host.guest_memfd,
            guest_memfd_flags: host.guest_memfd_flags,
            exit_hypercall: host.exit_hypercall,
            pre_fault: host.pre_fault,
            max_vcpus: host.max_vcpus,
            max_memslots: host.max_memslots,
            enforcement: host.enforcement.map(EnforcementMode::as_str),
            problems: host.problems,
        }
    }
}

#[pymethods]
impl PyHost {
    fn __repr__(&self) -> String {
        let Self {
            vm_types,
            memory_attributes,
            guest_memfd_flags,
            max_vcpus,
            max_memslots,
            problems,
            ..
        } = self;
        let enforcement = self.enforcement.map_or("None".to_owned(), |mode| format!("{mode:?}"));
        let [guest_memfd, exit_hypercall, pre_fault] =
            [self.guest_memfd, self.exit_hypercall, self.pre_fault].map(|yes| if yes { "True" } else { "False" });
        format!(
            "Host(vm_types={vm_types:?}, memory_attributes={memory_attributes}, guest_memfd={guest_memfd}, \
             guest_memfd_flags={guest_memfd_flags}, exit_hypercall={exit_hypercall}, pre_fault={pre_fault}, \
             max_vcpus={max_vcpus}, max_memslots={max_memslots}, enforcement={enforcement}, problems={problems:?})"
        )
    }
}

/// Asks /dev/kvm what this host offers. Never raises: ``problems`` of the result says what is missing.
#[pyfunction]
pub(crate) fn probe(py: Python<'_>) -> PyHost {
    py.detach(pagegate_core::hypervisor::host::probe).into()
}
