//! The registers with which a vCPU starts in real, protected or long mode.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::linux;
use super::long_mode::{CODE_SELECTOR, DATA_SELECTOR, Tables};
use crate::error::Error;
use crate::memory::address::State;
use crate::memory::views::Views;
use crate::x86::registers::{
    CR0_ET, CR0_MP, CR0_NE, CR0_PE, CR0_PG, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_PAE, EFER_LMA, EFER_LME, REGISTERS,
    RFLAGS_FIXED, SYSTEM_REGISTERS, register, segment_register, system_register,
};

/// The CPU mode that a vCPU starts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuMode {
    /// 16 bits, segments at 0.
    Real,
    /// 32 bits, flat segments, no paging.
    Protected,
    /// 64 bits, with all of memory identity-mapped in each view.
    Long,
}

impl CpuMode {
    /// The first value that RIP cannot have in this mode.
    pub(crate) fn rip_end(self) -> u64 {
        match self {
            CpuMode::Real => 1 << 16,
            CpuMode::Protected => 1 << 32,
            CpuMode::Long => u64::MAX,
        }
    }
}

fn segment(selector: u16, code: bool, bits: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if bits == 16 { 0xffff } else { 0xffff_ffff },
        selector,
        type_: if code { 0b1011 } else { 0b0011 },
        present: 1,
        dpl: 0,
        db: (bits == 32 || !code && bits == 64).into(),
        s: 1,
        l: (code && bits == 64).into(),
        g: (bits != 16).into(),
        ..Default::default()
    }
}

fn set_segments(sregs: &mut kvm_sregs, code: u16, data: u16, bits: u8) {
    sregs.cs = segment(code, true, bits);
    let data = segment(data, false, bits);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
}

/// The special registers (KVM_SET_SREGS) to start in `mode` with, made from those after reset.
pub fn sregs(mode: CpuMode, reset: &kvm_sregs, tables: Option<&Tables>, views: Views) -> kvm_sregs {
    let mut sregs = *reset;
    match (mode, tables) {
        (CpuMode::Real, _) => set_segments(&mut sregs, 0, 0, 16),
        (CpuMode::Protected, _) | (CpuMode::Long, None) => {
            set_segments(&mut sregs, CODE_SELECTOR, DATA_SELECTOR, 32);
            sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE;
        }
        (CpuMode::Long, Some(tables)) => {
            set_segments(&mut sregs, CODE_SELECTOR, DATA_SELECTOR, 64);
            sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG;
            sregs.cr3 = views.address(tables.gpa, State::Shared);
            sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
            sregs.efer = EFER_LME | EFER_LMA;
            sregs.gdt.base = tables.gdt;
            sregs.gdt.limit = 3 * 8 - 1;
            // No IDT: any exception becomes a triple fault, which ends the run as "shutdown".
            sregs.idt.limit = 0;
        }
    }
    sregs
}

/// The special registers to start Linux with, by its 64-bit boot protocol.
pub(crate) fn linux_sregs(reset: &kvm_sregs, entry: &linux::Entry) -> kvm_sregs {
    let mut sregs = *reset;
    set_segments(
        &mut sregs,
        linux::tables::CODE_SELECTOR,
        linux::tables::DATA_SELECTOR,
        64,
    );
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG;
    sregs.cr3 = entry.cr3;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs.gdt.base = entry.gdt;
    sregs.gdt.limit = linux::tables::GDT_SIZE - 1;
    sregs.idt.limit = 0;
    sregs
}

/// The general registers to start with; `given` system and segment registers are set in `sregs`.
///
/// # Errors
/// `Invalid` for a register that does not exist, and for a selector of more than 16 bits.
pub(crate) fn regs(given: &[(String, u64)], stack: u64, sregs: &mut kvm_sregs) -> Result<kvm_regs, Error> {
    let mut regs = kvm_regs {
        rflags: RFLAGS_FIXED,
        rsp: stack,
        ..Default::default()
    };
    for (name, value) in given {
        if let Some(register) = register(&mut regs, name).or_else(|| system_register(sregs, name)) {
            *register = *value;
            continue;
        }
        let real_mode = sregs.cr0 & CR0_PE == 0;
        let Some(segment) = segment_register(sregs, name) else {
            let known: Vec<&str> = REGISTERS.into_iter().chain(SYSTEM_REGISTERS).collect();
            let known = known.join(", ");
            return Err(Error::Invalid(format!(
                "there is no register {name:?}; there are {known}"
            )));
        };
        let selector = u16::try_from(*value);
        segment.selector =
            selector.map_err(|_| Error::Invalid(format!("{name} is {value:#x}: a selector has 16 bits")))?;
        if real_mode {
            segment.base = value << 4;
        }
    }
    regs.rflags |= RFLAGS_FIXED;
    Ok(regs)
}
