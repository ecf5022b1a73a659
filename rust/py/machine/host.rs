//! What this host offers.

use pagegate_core::hypervisor::host::{EnforcementMode, Host};
use pyo3::prelude::*;

/// What /dev/kvm offers, as far as pagegate uses it.
#[pyclass(name = "Host", module = "pagegate", frozen, get_all)]
pub(crate) struct PyHost {
    /// VM types (KVM_CAP_VM_TYPES): "default", "sw-protected", "sev", "sev-es", "snp", "tdx".
    vm_types: Vec<&'static str>,
    /// Mask of attributes that KVM_SET_MEMORY_ATTRIBUTES takes on the type with private memory; PRIVATE is 8.
    memory_attributes: u64,
    /// Whether a guest_memfd can be made (KVM_CAP_GUEST_MEMFD).
    guest_memfd: bool,
    /// Flags for it (KVM_CAP_GUEST_MEMFD_FLAGS): MMAP is 1, INIT_SHARED is 2.
    guest_memfd_flags: u64,
    /// Whether KVM_HC_MAP_GPA_RANGE can exit to user space (KVM_CAP_EXIT_HYPERCALL).
    exit_hypercall: bool,
    /// Whether there is KVM_PRE_FAULT_MEMORY.
    pre_fault: bool,
    /// vCPUs a VM can have.
    max_vcpus: u32,
    /// Memslots a VM can have.
    max_memslots: u32,
    /// What ``enforcement="auto"`` gives; ``None`` where no VM can be made.
    enforcement: Option<&'static str>,
    /// What is missing: a sentence each, with what to do about it.
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

/// What this host's KVM offers. Never raises: what is missing is in ``problems``.
#[pyfunction]
pub(crate) fn probe(py: Python<'_>) -> PyHost {
    py.detach(pagegate_core::hypervisor::host::probe).into()
}
