//! Which VM type and which enforcement a machine gets on this host.

use std::sync::Arc;

use kvm_bindings::CpuId;

use super::config::{Confidential, Config, Platform};
use crate::error::Error;
use crate::hypervisor::host::{self, EnforcementMode, VmType};
use crate::hypervisor::kvm::{KvmVm, TSS_AND_IDENTITY_MAP};
use crate::hypervisor::vm::{Capabilities, Hypervisor};
use crate::memory::views::Views;
use crate::x86::cpuid;

/// A VM, how it is made to enforce page states, and the CPUID that KVM supports.
pub(super) struct Chosen {
    pub hypervisor: Arc<dyn Hypervisor>,
    pub mode: EnforcementMode,
    pub cpuid: CpuId,
}

/// Creates the VM, or takes the one that the parameters name, and checks it against the parameters.
pub(super) fn choose(config: &Config, views: &Views) -> Result<Chosen, Error> {
    let (hypervisor, mode) = match &config.hypervisor {
        Some(hypervisor) => {
            let mode = config
                .enforcement
                .unwrap_or_else(|| automatic(config, of_fake(hypervisor.capabilities())));
            (hypervisor.clone(), mode)
        }
        None => open_kvm(config, views)?,
    };
    check_guest(config, mode, views)?;
    let what = "ask for the CPUID that KVM supports";
    let cpuid = hypervisor.supported_cpuid();
    let cpuid = cpuid.map_err(|errno| Error::Host { what, errno })?;
    check_limits(config, hypervisor.as_ref(), &cpuid, views)?;
    Ok(Chosen {
        hypervisor,
        mode,
        cpuid,
    })
}

fn check_limits(config: &Config, hypervisor: &dyn Hypervisor, cpuid: &CpuId, views: &Views) -> Result<(), Error> {
    let bits = cpuid::physical_bits(cpuid);
    if views.end() > 1 << bits {
        let message = format!(
            "guest-physical addresses have {bits} bits here, and memory with its views ends at {:#x}; use less memory or \
             a lower shared_bit or private_bit",
            views.end()
        );
        return Err(Error::NotSupported(message));
    }
    let vcpus = hypervisor.capabilities().vcpus;
    if config.vcpus > vcpus {
        return Err(Error::NotSupported(format!("this host allows {vcpus} vCPUs")));
    }
    Ok(())
}

fn of_fake(can: Capabilities) -> EnforcementMode {
    match can.private_attribute {
        true => EnforcementMode::Attributes,
        false => EnforcementMode::Memslots,
    }
}

/// The enforcement where none is named; `native` is that of a small guest.
fn automatic(config: &Config, native: EnforcementMode) -> EnforcementMode {
    match (config.platform, config.confidential, native) {
        (Platform::Bare, ..) => native,
        // KVM reads Linux's code and page tables for emulation, which it cannot do in a guest_memfd.
        (Platform::Pc, Some(Confidential::Sev), EnforcementMode::Attributes) => EnforcementMode::Traps,
        // Nothing is private.
        (Platform::Pc, ..) => EnforcementMode::Memslots,
    }
}

fn open_kvm(config: &Config, views: &Views) -> Result<(Arc<dyn Hypervisor>, EnforcementMode), Error> {
    host::open()?;
    let host = host::probe();
    let native = host.enforcement.unwrap_or(EnforcementMode::Memslots);
    let mode = config.enforcement.unwrap_or(match config.vm_type {
        Some(VmType::Default) => EnforcementMode::Memslots,
        _ => automatic(config, native),
    });
    let kind = config.vm_type.unwrap_or(match mode {
        EnforcementMode::Attributes | EnforcementMode::Traps => VmType::SwProtected,
        EnforcementMode::Memslots => VmType::Default,
    });
    if !host.vm_types.contains(&kind) {
        return Err(no_such_type(kind, &host.vm_types));
    }
    check_type(kind, mode)?;
    let ends = [TSS_AND_IDENTITY_MAP.start, TSS_AND_IDENTITY_MAP.end - 1];
    let with_tss = ends.into_iter().all(|gpa| views.locate(gpa).is_none());
    let vm = KvmVm::new(kind.number().into(), with_tss);
    let vm = vm.map_err(|errno| Error::Host {
        what: "create a VM",
        errno,
    })?;
    Ok((Arc::new(vm), mode))
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
        (VmType::Default, EnforcementMode::Memslots)
        | (VmType::SwProtected, EnforcementMode::Attributes | EnforcementMode::Traps) => Ok(()),
        (VmType::Default, EnforcementMode::Attributes | EnforcementMode::Traps) => unsupported(format!(
            "enforcement={:?} needs a VM type with private memory; \"default\" has none",
            mode.as_str()
        )),
        (VmType::SwProtected, EnforcementMode::Memslots) => {
            unsupported("enforcement=\"memslots\" is for vm_type=\"default\"; this type has attributes".to_owned())
        }
        (other, _) => unsupported(format!(
            "VM type {:?} is not supported yet: pagegate cannot launch it",
            other.as_str()
        )),
    }
}

/// Whether this guest can live with this enforcement.
fn check_guest(config: &Config, mode: EnforcementMode, views: &Views) -> Result<(), Error> {
    if mode == EnforcementMode::Traps && !views.split() {
        let message = "enforcement=\"traps\" traps the view that a page is not in, so it needs two views: give \
                       shared_bit or private_bit";
        return Err(Error::Invalid(message.to_owned()));
    }
    if mode == EnforcementMode::Attributes && config.platform == Platform::Pc {
        let message = "enforcement=\"attributes\" is for small guests: KVM's emulation reads Linux's code and page \
                       tables, and cannot reach them in a guest_memfd; use \"traps\" or \"memslots\"";
        return Err(Error::NotSupported(message.to_owned()));
    }
    Ok(())
}
