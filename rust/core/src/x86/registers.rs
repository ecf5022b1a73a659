//! Registers by name, and the bits of registers that start-up code sets.

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};

pub(crate) const CR0_PE: u64 = 1;
pub(crate) const CR0_MP: u64 = 1 << 1;
pub(crate) const CR0_ET: u64 = 1 << 4;
pub(crate) const CR0_NE: u64 = 1 << 5;
pub(crate) const CR0_PG: u64 = 1 << 31;
pub(crate) const CR4_PAE: u64 = 1 << 5;
pub(crate) const CR4_OSFXSR: u64 = 1 << 9;
pub(crate) const CR4_OSXMMEXCPT: u64 = 1 << 10;
pub(crate) const EFER_LME: u64 = 1 << 8;
pub(crate) const EFER_LMA: u64 = 1 << 10;
pub(crate) const RFLAGS_FIXED: u64 = 1 << 1;
pub(crate) const RFLAGS_IF: u64 = 1 << 9;

/// IA32_MTRR_DEF_TYPE: on, and memory is write-back. Firmware does this; without it Linux leaves the PAT alone, and its
/// first early conversion ends in a BUG().
pub(crate) const MTRRS_ON: kvm_msr_entry = kvm_msr_entry {
    index: 0x2ff,
    reserved: 0,
    data: 0x806,
};

/// The general registers, RIP and RFLAGS: the names that [`register`] takes.
pub const REGISTERS: [&str; 18] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip", "rflags",
];

/// The other registers that can be set at a vCPU's start. A segment register's value is its selector; in real mode that
/// sets its base, too.
pub const SYSTEM_REGISTERS: [&str; 14] = [
    "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "cs", "ds", "es", "fs", "gs", "ss", "fs_base", "gs_base",
];

/// The register of this name among [`SYSTEM_REGISTERS`], but for the segment registers.
pub fn system_register<'a>(sregs: &'a mut kvm_sregs, name: &str) -> Option<&'a mut u64> {
    Some(match name {
        "cr0" => &mut sregs.cr0,
        "cr2" => &mut sregs.cr2,
        "cr3" => &mut sregs.cr3,
        "cr4" => &mut sregs.cr4,
        "cr8" => &mut sregs.cr8,
        "efer" => &mut sregs.efer,
        "fs_base" => &mut sregs.fs.base,
        "gs_base" => &mut sregs.gs.base,
        _ => return None,
    })
}

/// The segment register of this name.
pub(crate) fn segment_register<'a>(sregs: &'a mut kvm_sregs, name: &str) -> Option<&'a mut kvm_segment> {
    Some(match name {
        "cs" => &mut sregs.cs,
        "ds" => &mut sregs.ds,
        "es" => &mut sregs.es,
        "fs" => &mut sregs.fs,
        "gs" => &mut sregs.gs,
        "ss" => &mut sregs.ss,
        _ => return None,
    })
}

/// The register of this name among [`REGISTERS`].
pub fn register<'a>(regs: &'a mut kvm_regs, name: &str) -> Option<&'a mut u64> {
    Some(match name {
        "rax" => &mut regs.rax,
        "rbx" => &mut regs.rbx,
        "rcx" => &mut regs.rcx,
        "rdx" => &mut regs.rdx,
        "rsi" => &mut regs.rsi,
        "rdi" => &mut regs.rdi,
        "rsp" => &mut regs.rsp,
        "rbp" => &mut regs.rbp,
        "r8" => &mut regs.r8,
        "r9" => &mut regs.r9,
        "r10" => &mut regs.r10,
        "r11" => &mut regs.r11,
        "r12" => &mut regs.r12,
        "r13" => &mut regs.r13,
        "r14" => &mut regs.r14,
        "r15" => &mut regs.r15,
        "rip" => &mut regs.rip,
        "rflags" => &mut regs.rflags,
        _ => return None,
    })
}
