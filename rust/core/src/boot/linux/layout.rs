//! Where things go in the memory of a Linux guest, and the memory map (e820) that tells the guest so.
//!
//! What only the start of the kernel needs is below 640 KiB, where no kernel is loaded; ACPI is where PCs have it. The
//! kernel is at the address that it prefers, and the initrd at the end of the memory below 4 GiB.

use linux_loader::loader::bootparam::boot_e820_entry;

use crate::boot::acpi::IO_APIC;
use crate::error::Error;
use crate::memory::address::{PAGE_SIZE, Range};

/// The gpa of the GDT, a page. The page at 0 stays zero, because Linux looks for the BIOS data area there.
pub const GDT: u64 = 0x6000;
/// The gpa of the boot parameters (the "zero page"), a page.
pub const BOOT_PARAMETERS: u64 = 0x7000;
/// The first gpa past the stack, which is a page. The kernel uses it until it has its own.
pub const STACK_END: u64 = 0x9000;
/// The gpa of the page tables, 6 pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// The gpa of the command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line and the NUL at its end, in bytes. Linux takes 2048 of them; a bzImage may ask for more.
pub const COMMAND_LINE_ROOM: u64 = 0x1_0000;
/// The first gpa past the memory that PCs have below 1 MiB; from there on a BIOS has its data. Linux looks below it for
/// room for the code that starts further vCPUs.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The gpa of the ACPI tables, which begin with the RSDP and end below [`ACPI_END`]. Linux also finds the RSDP here
/// by scanning.
pub const ACPI: u64 = 0xe_0000;
/// The first gpa past those that are for ACPI tables. From here on Linux has a resource of its own, "System ROM", beside which
/// it would not keep theirs.
pub const ACPI_END: u64 = 0xf_0000;
/// The gpa of the BIOS's entry point: F000:FFF0 in real mode.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// The lowest gpa of a kernel or an initrd.
pub const HIGH_MEMORY: u64 = 1 << 20;
/// The least bytes of memory below 4 GiB: a kernel at 16 MiB, and memory for it to work with.
pub const LEAST_MEMORY: u64 = 32 << 20;

/// Memory continues here if there is more than fits below the devices' addresses.
const FOUR_GIB: u64 = 1 << 32;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// Of ACPI tables. A SEV guest maps such memory as private; what is merely reserved it takes for a device's.
const E820_ACPI: u32 = 3;

const MIB: u64 = 1 << 20;

/// The first gpa past the memory below 4 GiB, which is the guest's first range.
///
/// # Errors
/// `Invalid` unless `ram` is one range that starts at 0, has at least [`LEAST_MEMORY`] and ends where devices start or
/// below, or that and a second one at 4 GiB or above.
pub(super) fn memory_end(ram: &[Range]) -> Result<u64, Error> {
    let (low, high) = match ram {
        [low] => (low, None),
        [low, high] => (low, Some(high)),
        _ => {
            let message = format!("a Linux guest has memory in one or two ranges, not in {}", ram.len());
            return Err(Error::Invalid(message));
        }
    };
    if low.gpa() != 0 {
        let message = format!("the memory of a Linux guest starts at 0, not at {:#x}", low.gpa());
        return Err(Error::Invalid(message));
    }
    if low.end() < LEAST_MEMORY {
        let (have, least) = (low.size() >> 10, LEAST_MEMORY / MIB);
        let message = format!("{have} KiB of memory: a Linux guest needs at least {least} MiB");
        return Err(Error::Invalid(message));
    }
    if low.end() > u64::from(IO_APIC) {
        let message = format!(
            "the memory below 4 GiB ends at {:#x}, and devices start at {IO_APIC:#x}: put the rest at 4 GiB",
            low.end()
        );
        return Err(Error::Invalid(message));
    }
    if let Some(high) = high.filter(|high| high.gpa() < FOUR_GIB) {
        let message = format!("the second range of memory starts at {:#x}, below 4 GiB", high.gpa());
        return Err(Error::Invalid(message));
    }
    Ok(low.end())
}

/// The memory map, ascending. Of the first range, the addresses from [`LOW_MEMORY_END`] to 1 MiB are reserved, or have the
/// ACPI tables.
pub(super) fn e820(ram: &[Range]) -> Vec<boot_e820_entry> {
    let entry = |addr, end: u64, kind| boot_e820_entry {
        addr,
        size: end - addr,
        r#type: kind,
    };
    let mut map = Vec::new();
    for range in ram {
        let mut start = range.gpa();
        if start == 0 {
            map.push(entry(start, LOW_MEMORY_END, E820_RAM));
            map.push(entry(LOW_MEMORY_END, ACPI, E820_RESERVED));
            map.push(entry(ACPI, ACPI_END, E820_ACPI));
            map.push(entry(ACPI_END, HIGH_MEMORY, E820_RESERVED));
            start = HIGH_MEMORY;
        }
        map.push(entry(start, range.end(), E820_RAM));
    }
    map
}

/// Checks that a kernel, which occupies the gpas from `start` to `end` while it sets itself up, fits below
/// `memory_end`.
///
/// # Errors
/// `Invalid` if it does not, or if it starts below 1 MiB.
pub(super) fn check_kernel(start: u64, end: u64, memory_end: u64) -> Result<(), Error> {
    if start < HIGH_MEMORY {
        let message = format!("the kernel is to be loaded at {start:#x}, below 1 MiB: give another kernel");
        return Err(Error::Invalid(message));
    }
    if end > memory_end {
        let (size, needed, have) = ((end - start).div_ceil(MIB), end.div_ceil(MIB), memory_end / MIB);
        let message = format!(
            "this kernel needs {size} MiB at {start:#x}, so {needed} MiB of memory below 4 GiB, and the guest has \
             {have} MiB: give it more"
        );
        return Err(Error::Invalid(message));
    }
    Ok(())
}

/// The gpa of an initrd of `size` bytes: page aligned, and as high as it fits below `memory_end` without going past
/// `last`, the highest address that the kernel takes.
///
/// # Errors
/// `Invalid` if the initrd is empty, or if there is no room for it after the kernel, which ends at `kernel_end`.
pub(super) fn place_initrd(size: u64, kernel_end: u64, last: u64, memory_end: u64) -> Result<u64, Error> {
    if size == 0 {
        let message = "the initrd is empty: leave it out, or give another file";
        return Err(Error::Invalid(message.to_owned()));
    }
    let end = memory_end.min(last.saturating_add(1));
    let gpa = end.checked_sub(size).map(|gpa| gpa - gpa % PAGE_SIZE);
    gpa.filter(|gpa| *gpa >= kernel_end).ok_or_else(|| {
        let remedy = match end == memory_end {
            true => "the end of the memory below 4 GiB: give the guest more memory",
            false => "the highest address that this kernel takes: make the initrd smaller",
        };
        Error::Invalid(format!(
            "the initrd has {size} bytes, which do not fit between the end of the kernel, {kernel_end:#x}, and \
             {end:#x}, {remedy}"
        ))
    })
}
