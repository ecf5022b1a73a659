//! Accesses to MSRs that KVM leaves to user space: those that it does not have, and those of the guest's profile.

use super::running::RunningVcpu;
use crate::hypervisor::exit::{offset, put};

/// RDMSR. The guest gets #GP for an MSR that does not exist.
pub(super) fn read(vcpu: &mut RunningVcpu<'_>, index: u32) {
    let value = vcpu.context.sev.and_then(|sev| sev.read_msr(index));
    put(
        vcpu.state.hv.kvm_run(),
        offset::MSR_DATA,
        &value.unwrap_or_default().to_le_bytes(),
    );
    answer(vcpu, value.is_some());
}

/// WRMSR, likewise.
pub(super) fn write(vcpu: &mut RunningVcpu<'_>, index: u32) {
    let taken = vcpu.context.sev.is_some_and(|sev| sev.takes_msr(index));
    answer(vcpu, taken);
}

fn answer(vcpu: &mut RunningVcpu<'_>, exists: bool) {
    put(vcpu.state.hv.kvm_run(), offset::MSR_ERROR, &[u8::from(!exists)]);
    vcpu.state.reply_due = true;
}
