//! Where a vCPU begins: real, protected or long mode.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::attributes::{PAGE_SIZE, State};
use crate::error::Error;
use crate::views::Views;

/// The CPU mode that a vCPU starts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 16 bits, segments at 0.
    Real,
    /// 32 bits, flat segments, no paging.
    Protected,
    /// 64 bits, the first GiB and its shared views mapped to themselves.
    Long,
}

const CR0_PE: u64 = 1;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXMMEXCPT: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_FIXED: u64 = 1 << 1;

const ENTRY_TABLE: u64 = 0b111;
const ENTRY_LARGE: u64 = 0b1000_0111;
const ENTRIES: usize = 512;
const LARGE_PAGE: u64 = 2 << 20;
const GIB_SHIFT: u32 = 30;
const PML4_SHIFT: u32 = 39;
/// Above this bit a linear address that equals its gpa is not canonical.
const HIGHEST_IDENTITY_BIT: u32 = 46;

const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const CODE64_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

/// The page tables and the GDT of mode "long", and where they belong.
pub struct Tables {
    /// Their first byte, without the shared bit.
    pub gpa: u64,
    /// Whole pages.
    pub bytes: Vec<u8>,
    gdt: u64,
}

struct Builder {
    pages: Vec<[u64; ENTRIES]>,
    base: u64,
    views: Views,
}

impl Builder {
    /// The address of a table's page as the CPU must walk it: a page walk never asks for a conversion.
    fn address(&self, page: usize) -> u64 {
        self.views.address(self.base + page as u64 * PAGE_SIZE, State::Shared)
    }

    /// The table that `entry` of `table` points to, made if need be.
    fn below(&mut self, table: usize, entry: u64, next: &mut usize) -> usize {
        let entry = (entry as usize) % ENTRIES;
        let present = self.pages[table][entry];
        if present != 0 {
            return ((present & !0xfff) - self.address(0)) as usize / PAGE_SIZE as usize;
        }
        let page = *next;
        *next += 1;
        self.pages[table][entry] = self.address(page) | ENTRY_TABLE;
        page
    }

    /// Maps the GiB at `at` to itself.
    fn gib(&mut self, at: u64, next: &mut usize) {
        let pdpt = self.below(0, at >> PML4_SHIFT, next);
        let pd = self.below(pdpt, at >> GIB_SHIFT, next);
        for (i, entry) in self.pages[pd].iter_mut().enumerate() {
            *entry = ((at >> GIB_SHIFT << GIB_SHIFT) + i as u64 * LARGE_PAGE) | ENTRY_LARGE;
        }
    }
}

/// PML4; PDPT and PD of the private views; PDPT and PD of the shared ones; the GDT last.
const TABLE_PAGES: usize = 6;

/// Builds the tables for this memory.
///
/// # Errors
/// `Invalid` for memory without room for them, `NotSupported` for a shared bit that long mode cannot map.
pub fn tables(views: Views) -> Result<Tables, Error> {
    let bytes = TABLE_PAGES as u64 * PAGE_SIZE;
    let Some(base) = views.size().checked_sub(bytes) else {
        let message = format!("mode \"long\" keeps {bytes:#x} bytes of tables at the top of memory; give it more");
        return Err(Error::Invalid(message));
    };
    if views.shared_mask() >> HIGHEST_IDENTITY_BIT > 1 {
        let message = format!(
            "mode \"long\" maps the shared views to themselves, so shared_bit is at most {HIGHEST_IDENTITY_BIT}"
        );
        return Err(Error::NotSupported(message));
    }
    let mut builder = Builder {
        pages: vec![[0; ENTRIES]; TABLE_PAGES],
        base,
        views,
    };
    let mut next = 1;
    builder.gib(0, &mut next);
    if views.split() {
        builder.gib(views.shared_mask(), &mut next);
    }
    let gdt = TABLE_PAGES - 1;
    builder.pages[gdt][usize::from(CODE_SELECTOR / 8)] = CODE64_DESCRIPTOR;
    builder.pages[gdt][usize::from(DATA_SELECTOR / 8)] = DATA_DESCRIPTOR;
    Ok(Tables {
        gpa: base,
        gdt: builder.address(gdt),
        bytes: builder
            .pages
            .iter()
            .flatten()
            .flat_map(|entry| entry.to_le_bytes())
            .collect(),
    })
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

/// The special registers for `mode`, from those after reset.
pub fn sregs(mode: Mode, reset: &kvm_sregs, tables: Option<&Tables>, views: Views) -> kvm_sregs {
    let mut sregs = *reset;
    match (mode, tables) {
        (Mode::Real, _) => set_segments(&mut sregs, 0, 0, 16),
        (Mode::Protected, _) | (Mode::Long, None) => {
            set_segments(&mut sregs, CODE_SELECTOR, DATA_SELECTOR, 32);
            sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE;
        }
        (Mode::Long, Some(tables)) => {
            set_segments(&mut sregs, CODE_SELECTOR, DATA_SELECTOR, 64);
            sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG;
            sregs.cr3 = views.address(tables.gpa, State::Shared);
            sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
            sregs.efer = EFER_LME | EFER_LMA;
            sregs.gdt.base = tables.gdt;
            sregs.gdt.limit = 3 * 8 - 1;
            // No IDT: an exception is a triple fault, which ends the run as "shutdown".
            sregs.idt.limit = 0;
        }
    }
    sregs
}

/// The general registers, as named by the caller.
///
/// # Errors
/// A name that is none, a value that does not fit the mode, with what would do.
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

/// The names that [`register`] knows.
pub const REGISTERS: [&str; 18] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    "rip", "rflags",
];

/// The other registers that a vCPU can be started with. A segment's value is its selector, in real mode with its base.
pub const SYSTEM_REGISTERS: [&str; 14] = [
    "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "cs", "ds", "es", "fs", "gs", "ss", "fs_base", "gs_base",
];

fn system_register<'a>(sregs: &'a mut kvm_sregs, name: &str) -> Option<&'a mut u64> {
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

fn segment_register<'a>(sregs: &'a mut kvm_sregs, name: &str) -> Option<&'a mut kvm_segment> {
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

/// The general register of this name.
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
