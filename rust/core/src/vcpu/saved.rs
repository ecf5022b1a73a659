//! A vCPU of a machine that is put aside: all that KVM says of it between runs.

use kvm_bindings::{
    CpuId, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::state::VcpuState;
use crate::errno::Errno;
use crate::error::Error;
use crate::hypervisor::exit::Exit;

/// MSR_IA32_TSC_DEADLINE. The local APIC has to be in that mode before.
const TSC_DEADLINE: u32 = 0x6e0;
/// CPUID leaf 1, ECX, and leaf 7, ECX: what the guest has set in CR4.
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;

/// A vCPU's state.
#[derive(Deserialize, Serialize)]
pub(crate) struct SavedVcpu {
    started: bool,
    halted: bool,
    cpuid: CpuId,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: Xsave,
    debug_regs: kvm_debugregs,
    /// With interrupt controllers in the kernel.
    lapic: Option<kvm_lapic_state>,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
    mp_state: kvm_mp_state,
    events: kvm_vcpu_events,
}

/// The MSRs whose values are addresses of memory that KVM writes to, in their upper bits: wall clock and kvmclock, old and
/// new; asynchronous page faults, steal time, end of interrupt.
const ADDRESSES: [u32; 7] = [
    0x11,
    0x12,
    0x4b56_4d00,
    0x4b56_4d01,
    0x4b56_4d02,
    0x4b56_4d03,
    0x4b56_4d04,
];
const ADDRESS_MASK: u64 = !0x3f;
/// The most that KVM has there.
const LONGEST: u64 = 128;
const CR0_PG: u64 = 1 << 31;

impl SavedVcpu {
    /// Addresses of memory that KVM may touch while it is given this state: what MSRs point to, and the table in CR3.
    pub(crate) fn touched_by_kvm(&self) -> Vec<u64> {
        let msrs = self
            .msrs
            .iter()
            .filter(|(index, value)| ADDRESSES.contains(index) && *value != 0);
        let ends = msrs.flat_map(|(_, value)| [value & ADDRESS_MASK, (value & ADDRESS_MASK).saturating_add(LONGEST)]);
        let table = (self.sregs.cr0 & CR0_PG != 0).then_some(self.sregs.cr3);
        ends.chain(table).collect()
    }
}

/// KVM lists some 140, and each is set by an ioctl of its own.
const MOST_MSRS: usize = 1024;

fn failed(what: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Host { what, errno }
}

impl VcpuState {
    /// Its state, with those of these MSRs that it has. KVM has been given every answer that is due.
    ///
    /// # Errors
    /// `NotSupported` if a store of it was not answered: KVM has it, and does not give it out. Any other instruction that
    /// was not answered is executed again. `Host` where an ioctl fails.
    pub(crate) fn save(&self, msrs: &[u32], with_lapic: bool) -> Result<SavedVcpu, Error> {
        if let Some(Exit::Mmio(mmio)) = &self.pending
            && mmio.write
        {
            return Err(Error::NotSupported(format!(
                "vCPU {} waits for the answer to its store at {:#x}: let it run on before the snapshot",
                self.index, mmio.gpa
            )));
        }
        let failed = failed("read a vCPU's state");
        let msr = |index: &u32| Some((*index, self.hv.msrs(&[*index]).ok()?.first()?.data));
        Ok(SavedVcpu {
            started: self.started,
            halted: self.halted,
            cpuid: self.hv.cpuid().map_err(&failed)?,
            regs: self.hv.regs().map_err(&failed)?,
            sregs: self.hv.sregs().map_err(&failed)?,
            xcrs: self.hv.xcrs().map_err(&failed)?,
            xsave: self.hv.xsave().map_err(&failed)?,
            debug_regs: self.hv.debug_regs().map_err(&failed)?,
            lapic: match with_lapic {
                true => Some(self.hv.lapic().map_err(&failed)?),
                false => None,
            },
            msrs: msrs.iter().filter_map(msr).collect(),
            mp_state: self.hv.mp_state().map_err(&failed)?,
            events: self.hv.vcpu_events().map_err(&failed)?,
        })
    }

    /// Takes a state that was saved, before its first run.
    ///
    /// # Errors
    /// `NotSupported` for what this host cannot give it; `Host` where an ioctl fails.
    pub(crate) fn restore(&mut self, saved: &SavedVcpu) -> Result<(), Error> {
        let failed = failed("set a vCPU's state");
        self.check(saved)?;
        self.hv.set_cpuid(&saved.cpuid).map_err(&failed)?;
        self.put_back(saved)
    }

    /// Whether this vCPU has what the guest has found.
    ///
    /// # Errors
    /// `NotSupported` for a feature that it lacks; `Invalid` for more MSRs than KVM has; `Host` where an ioctl fails.
    pub(crate) fn check(&self, saved: &SavedVcpu) -> Result<(), Error> {
        if saved.msrs.len() > MOST_MSRS {
            let has = saved.msrs.len();
            return Err(Error::Invalid(format!(
                "a vCPU has {has} MSRs: there are {MOST_MSRS} at most"
            )));
        }
        let own = self.hv.cpuid().map_err(failed("read a vCPU's CPUID"))?;
        check_features(own.as_slice(), saved.cpuid.as_slice())
    }

    /// The same, but for CPUID, which stays as it is once the vCPU has run.
    ///
    /// # Errors
    /// As [`restore`](Self::restore).
    pub(crate) fn put_back(&mut self, saved: &SavedVcpu) -> Result<(), Error> {
        let failed = failed("set a vCPU's state");
        self.hv.set_sregs(&saved.sregs).map_err(&failed)?;
        self.hv.set_regs(&saved.regs).map_err(&failed)?;
        self.hv.set_xcrs(&saved.xcrs).map_err(&failed)?;
        self.hv.set_xsave(&saved.xsave).map_err(&failed)?;
        self.hv.set_debug_regs(&saved.debug_regs).map_err(&failed)?;
        if let Some(lapic) = &saved.lapic {
            self.hv.set_lapic(lapic).map_err(&failed)?;
        }
        let (last, first): (Vec<_>, Vec<_>) = saved
            .msrs
            .iter()
            .copied()
            .partition(|(index, _)| *index == TSC_DEADLINE);
        for (index, data) in first.into_iter().chain(last) {
            self.set_msr(index, data)?;
        }
        self.hv.set_mp_state(saved.mp_state).map_err(&failed)?;
        self.hv.set_vcpu_events(&saved.events).map_err(&failed)?;
        (self.started, self.halted) = (saved.started, saved.halted);
        Ok(())
    }

    /// One that cannot be written may have that value already.
    fn set_msr(&mut self, index: u32, data: u64) -> Result<(), Error> {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let Err(errno) = self.hv.set_msrs(&[entry]) else {
            return Ok(());
        };
        match self
            .hv
            .msrs(&[index])
            .is_ok_and(|now| now.iter().all(|now| now.data == data))
        {
            true => Ok(()),
            false => Err(Error::NotSupported(format!(
                "this host does not let MSR {index:#x} be {data:#x}, as it is in the snapshot: {errno}"
            ))),
        }
    }
}

/// The registers of CPUID that say which features there are: leaf, subleaf, and for EAX, EBX, ECX and EDX the bits.
const FEATURES: [(u32, u32, [u32; 4]); 6] = [
    (0x1, 0, [0, 0, !OSXSAVE, !0]),
    (0x7, 0, [0, !0, !OSPKE, !0]),
    (0x7, 1, [!0, 0, 0, !0]),
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
];

/// Whether this host's vCPUs have every feature that the guest has found.
fn check_features(own: &[kvm_cpuid_entry2], wanted: &[kvm_cpuid_entry2]) -> Result<(), Error> {
    let registers = |entries: &[kvm_cpuid_entry2], leaf, subleaf| {
        let entry = entries
            .iter()
            .find(|entry| (entry.function, entry.index) == (leaf, subleaf));
        entry.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    };
    for (leaf, subleaf, bits) in FEATURES {
        let (own, wanted) = (registers(own, leaf, subleaf), registers(wanted, leaf, subleaf));
        for (at, name) in ["EAX", "EBX", "ECX", "EDX"].into_iter().enumerate() {
            let missing = wanted[at] & bits[at] & !own[at];
            if missing != 0 {
                return Err(Error::NotSupported(format!(
                    "this host's CPU lacks features that the snapshot's guest has: bits {missing:#x} of CPUID leaf {leaf:#x}, \
                     subleaf {subleaf}, {name}"
                )));
            }
        }
    }
    Ok(())
}
