//! What a vCPU of the fake has besides its script: the registers that are read and set.

use std::collections::BTreeMap;

use kvm_bindings::{
    CpuId, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use parking_lot::Mutex;

use crate::errno::Errno;
use crate::hypervisor::vm::Inspect;

/// The state that KVM_GET_* and KVM_SET_* access. It has no effect on the script.
pub(super) struct Registers {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub cpuid: CpuId,
    pub msrs: BTreeMap<u32, u64>,
    pub lapic: kvm_lapic_state,
    pub xsave: Xsave,
    pub xcrs: kvm_xcrs,
    pub events: kvm_vcpu_events,
    pub mp_state: kvm_mp_state,
    pub debug_regs: kvm_debugregs,
}

impl Default for Registers {
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "a length of 0 is allowed")]
        Self {
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            cpuid: CpuId::new(0).expect("an empty list"),
            msrs: BTreeMap::new(),
            lapic: kvm_lapic_state::default(),
            xsave: Xsave::new(0).expect("no part beyond the fixed one"),
            xcrs: kvm_xcrs::default(),
            events: kvm_vcpu_events::default(),
            mp_state: kvm_mp_state::default(),
            debug_regs: kvm_debugregs::default(),
        }
    }
}

impl Inspect for Mutex<Registers> {
    fn regs(&self) -> Result<kvm_regs, Errno> {
        Ok(self.lock().regs)
    }

    fn sregs(&self) -> Result<kvm_sregs, Errno> {
        Ok(self.lock().sregs)
    }

    fn msr(&self, index: u32) -> Result<u64, Errno> {
        Ok(self.lock().msrs.get(&index).copied().unwrap_or_default())
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        Some(linear)
    }
}
