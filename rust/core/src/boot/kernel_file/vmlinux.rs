//! An ELF vmlinux for x86-64: whether a file is one, and its segments at the addresses that it is linked at.

use object::elf;
use object::read::elf::{FileHeader, ProgramHeader};

use super::foreign::BRING;
use super::pace::no_memory;
use crate::allocation::push;
use crate::error::Error;

/// The kernel's image and its modules are linked into the last 2 GiB of the address space, which begin here.
pub(super) const KERNEL_START: u64 = 0xffff_ffff_8000_0000;

/// The most program headers. Linux has five.
const MOST_HEADERS: usize = 4096;

type Header = elf::FileHeader64<object::LittleEndian>;

/// What a segment has in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Loaded<'a> {
    /// The virtual address of its first byte.
    pub(super) address: u64,
    pub(super) bytes: &'a [u8],
}

impl<'a> Loaded<'a> {
    /// The bytes from `start` on, to `end` or the segment's end. `None` if `start` is not in it.
    pub(super) fn part(&self, start: u64, end: u64) -> Option<&'a [u8]> {
        let skip = usize::try_from(start.checked_sub(self.address)?).ok()?;
        let rest = self.bytes.get(skip..).filter(|rest| !rest.is_empty())?;
        let length = usize::try_from(end.checked_sub(start)?).ok()?;
        Some(&rest[..length.min(rest.len())])
    }
}

/// Checks that `bytes`, which begin with ELF's magic number, are a whole vmlinux, or says what they are.
pub(super) fn check(bytes: &[u8]) -> Result<(), Error> {
    match bytes.get(elf::ELFMAG.len()) {
        Some(&class) if class == elf::ELFCLASS64.0 => {}
        Some(&class) if class == elf::ELFCLASS32.0 => {
            return refused(format!("the file is a 32-bit ELF file; {BRING}"));
        }
        _ => return refused(format!("the ELF file is damaged; {BRING}")),
    }
    let header = header(bytes)?;
    let endian = object::LittleEndian;
    match header.e_machine(endian) {
        elf::EM_X86_64 => {}
        elf::EM_AARCH64 => return refused(format!("the ELF file is for arm64; {BRING}")),
        elf::EM_RISCV => return refused(format!("the ELF file is for RISC-V; {BRING}")),
        other => {
            return refused(format!(
                "the ELF file is for another processor (e_machine {}); {BRING}",
                other.0
            ));
        }
    }
    match header.e_type(endian) {
        elf::ET_EXEC => {}
        elf::ET_REL => {
            return refused(format!(
                "the file is an object file or a kernel module (ELF ET_REL); {BRING}"
            ));
        }
        elf::ET_CORE => return refused(format!("the file is a core dump (ELF ET_CORE); {BRING}")),
        elf::ET_DYN => {
            return refused(format!(
                "the file is a program or a shared library (ELF ET_DYN); {BRING}"
            ));
        }
        other => return refused(format!("the ELF file is no executable (e_type {}); {BRING}", other.0)),
    }
    if segments(bytes)?.iter().all(|loaded| loaded.address < KERNEL_START) {
        return refused(format!(
            "the file is a program, not a kernel: no segment of it is linked at {KERNEL_START:#x} or above; {BRING}"
        ));
    }
    Ok(())
}

/// The segments to load that have bytes in the file, in the order of the file.
pub(super) fn segments(bytes: &[u8]) -> Result<Vec<Loaded<'_>>, Error> {
    let endian = object::LittleEndian;
    let file_size = bytes.len();
    let (mut segments, mut total) = (Vec::new(), 0_usize);
    let headers = header(bytes)?.program_headers(endian, bytes).map_err(damaged)?;
    if headers.len() > MOST_HEADERS {
        let count = headers.len();
        return refused(format!("the ELF file is damaged: it has {count} program headers"));
    }
    for program in headers {
        if program.p_type(endian) != elf::PT_LOAD {
            continue;
        }
        let Ok(bytes) = program.data(endian, bytes) else {
            return refused("the vmlinux is cut off: a segment lies outside of the file; copy it again");
        };
        // All of them are searched for symbols: thousands of segments with the whole file each would take for ever.
        total = total.saturating_add(bytes.len());
        if total > file_size.saturating_mul(2) {
            return refused("the ELF file is damaged: its segments overlap in the file");
        }
        let address = program.p_vaddr(endian);
        if address.checked_add(bytes.len() as u64).is_none() {
            return refused("the ELF file is damaged: a segment lies outside of the address space");
        }
        push(&mut segments, Loaded { address, bytes }).map_err(no_memory)?;
    }
    Ok(segments)
}

pub(super) fn header(bytes: &[u8]) -> Result<&Header, Error> {
    let header = Header::parse(bytes).map_err(damaged)?;
    // Anything else but little-endian.
    header.endian().map_err(damaged)?;
    Ok(header)
}

pub(super) fn damaged(error: object::Error) -> Error {
    Error::Invalid(format!("the ELF file is damaged or cut off: {error}"))
}

fn refused<T>(why: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid(why.into()))
}
