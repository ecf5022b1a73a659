//! The page tables and the GDT that a vCPU enters Linux with.
//!
//! The 64-bit boot protocol wants the kernel, the boot parameters and the command line identity-mapped. These and the
//! initrd are below 4 GiB, so no more than that is mapped.

use super::layout::PAGE_TABLES;
use crate::error::Error;
use crate::memory::address::{PAGE_SIZE, Range};

/// The selector of the code segment (`__BOOT_CS`).
pub const CODE_SELECTOR: u16 = 0x10;
/// The selector of the data segments (`__BOOT_DS`).
pub const DATA_SELECTOR: u16 = 0x18;
/// The size of the GDT in bytes.
pub const GDT_SIZE: u16 = 4 * 8;

const CODE64_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

/// Present, writable.
const ENTRY_TABLE: u64 = 0b11;
/// Present, writable, a page of 2 MiB.
const ENTRY_LARGE: u64 = 0b1000_0011;
const LARGE_PAGE: u64 = 2 << 20;
/// How many page directories there are. Each maps a GiB.
const DIRECTORIES: u64 = 4;
const ENTRIES: u64 = PAGE_SIZE / 8;

/// The highest bit that a guest-physical address has on any CPU.
const HIGHEST_BIT: u32 = 51;

/// The mask of the private bit; 0 where there is none.
///
/// # Errors
/// `Invalid` for a bit that the addresses of memory or devices have, or that no CPU has.
pub(super) fn private_mask(private_bit: Option<u32>, ram: &[Range]) -> Result<u64, Error> {
    let Some(bit) = private_bit else {
        return Ok(0);
    };
    let end = ram.iter().map(Range::end).fold(DIRECTORIES << 30, u64::max);
    // The addresses below `end` have the bits below this one.
    let lowest = u64::BITS - (end - 1).leading_zeros();
    if !(lowest..=HIGHEST_BIT).contains(&bit) {
        let message = format!(
            "private bit {bit}: this guest has addresses up to {end:#x}, so its private bit is one from {lowest} to \
             {HIGHEST_BIT}"
        );
        return Err(Error::Invalid(message));
    }
    Ok(1 << bit)
}

/// The page tables, to be written to [`PAGE_TABLES`]: the PML4, then the PDPT, then the page directories.
///
/// The references to tables have `mask`, the private bit, set, and so have the entries that map any of `ram`. What maps
/// only devices has it clear.
pub(super) fn page_tables(ram: &[Range], mask: u64) -> Vec<u8> {
    let table = |number: u64| (PAGE_TABLES + number * PAGE_SIZE) | ENTRY_TABLE | mask;
    let mut words = vec![table(1)];
    words.resize(ENTRIES as usize, 0);
    words.extend((0..DIRECTORIES).map(|number| table(2 + number)));
    words.resize(2 * ENTRIES as usize, 0);
    words.extend((0..DIRECTORIES * ENTRIES).map(|number| {
        let gpa = number * LARGE_PAGE;
        let memory = ram
            .iter()
            .any(|range| range.gpa() < gpa + LARGE_PAGE && gpa < range.end());
        gpa | ENTRY_LARGE | if memory { mask } else { 0 }
    }));
    bytes(&words)
}

/// The GDT: [`GDT_SIZE`] bytes.
pub(super) fn gdt() -> Vec<u8> {
    bytes(&[0, 0, CODE64_DESCRIPTOR, DATA_DESCRIPTOR])
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
