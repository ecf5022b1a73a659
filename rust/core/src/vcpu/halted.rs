//! Whether a PC's guest has halted for good. Its HLT sleeps in the kernel and causes no exit, so the vCPUs are looked at
//! from time to time.

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED};

use super::running::RunningVcpu;
use crate::x86::registers::RFLAGS_IF;

/// Notes whether nothing but another vCPU can wake this one: it halted with interrupts off, or waits for INIT or SIPI.
/// Called when it was kicked.
pub(super) fn look(vcpu: &mut RunningVcpu<'_>) {
    if !vcpu.context.is_pc {
        return;
    }
    let mp_state = vcpu.state.hv.mp_state().map_or(0, |state| state.mp_state);
    let asleep = match mp_state {
        KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => true,
        KVM_MP_STATE_HALTED => vcpu.state.hv.regs().is_ok_and(|regs| regs.rflags & RFLAGS_IF == 0),
        _ => false,
    };
    if asleep {
        vcpu.context.control.asleep(vcpu.state.index);
    }
}
