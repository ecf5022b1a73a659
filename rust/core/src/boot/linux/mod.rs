//! A Linux guest in memory, ready for the 64-bit boot protocol: kernel, initrd, command line, boot parameters, ACPI,
//! page tables, and a way to reboot.
//!
//! - [`layout`]: where it all goes, and the memory map
//! - `kernel`: the kernel's file; [`tables`]: the page tables and the GDT; `reset_vector`: the way to reboot;
//!   `write`: writing it, in parts

mod kernel;
pub mod layout;
mod reset_vector;
pub mod tables;
mod write;

use linux_loader::loader::bootparam::boot_params;
use vm_memory::{ByteValued, GuestMemoryBackend};

use self::kernel::Kernel;
use self::layout::{ACPI, BOOT_PARAMETERS, COMMAND_LINE, COMMAND_LINE_ROOM, GDT, PAGE_TABLES, RESET_VECTOR, STACK_END};
use self::write::write;
use crate::boot::acpi;
use crate::error::Error;
use crate::input::Watch;
use crate::memory::address::Range;

/// `type_of_loader`: a loader that has no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// What a Linux guest is made of.
#[derive(Clone, Copy, Debug)]
pub struct LinuxGuest<'a> {
    /// A bzImage with an entry point for 64-bit code, or an ELF file (vmlinux).
    pub kernel: &'a [u8],
    /// Which of the two it is.
    pub is_bzimage: bool,
    /// The initial RAM disk: the bytes of its file.
    pub initrd: Option<&'a [u8]>,
    /// The kernel's command line.
    pub command_line: &'a str,
    /// The guest's memory: one range that starts at 0, or a second one too, at 4 GiB or above. What is between is for
    /// devices.
    pub ram: &'a [Range],
    /// How many vCPUs there are; their APIC ids are their indices.
    pub vcpus: u32,
    /// For a software SEV guest: the bit of a gpa that means private. Its page tables map all memory as private.
    pub private_bit: Option<u32>,
    /// Whether there is a PCI bus.
    pub pci: bool,
}

/// What the first vCPU starts with, in long mode, with interrupts disabled and with the selectors of [`tables`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The gpa of the first instruction.
    pub rip: u64,
    /// The end of a stack of one page.
    pub rsp: u64,
    /// The gpa of the boot parameters.
    pub rsi: u64,
    /// The gpa of the PML4, with the private bit where there is one.
    pub cr3: u64,
    /// The linear address of the GDT, which has [`tables::GDT_SIZE`] bytes.
    pub gdt: u64,
}

impl LinuxGuest<'_> {
    /// Writes the guest to `memory`, at gpas without the private bit. `memory` must be all zeroes and have
    /// [`LinuxGuest::ram`].
    ///
    /// # Errors
    /// `Invalid`, and nothing is written, for memory that is too small or is not laid out as it must be, a kernel or an
    /// initrd that is damaged or does not fit, a command line that the kernel does not take, no vCPU or too many, and a
    /// private bit that addresses have. `Invalid` also if `memory` cannot be written, and `Interrupted` for a failure of
    /// `watch`, which is called again and again.
    pub fn load<M: GuestMemoryBackend>(&self, memory: &M, watch: &mut Watch<'_>) -> Result<Entry, Error> {
        let memory_end = layout::memory_end(self.ram)?;
        let mask = tables::private_mask(self.private_bit, self.ram)?;
        let acpi = acpi::tables(self.vcpus, ACPI, self.pci)?;
        let kernel = match self.is_bzimage {
            true => Kernel::bzimage(self.kernel, memory_end)?,
            false => Kernel::elf(self.kernel, memory_end)?,
        };
        let command_line = command_line(self.command_line, kernel.header.cmdline_size)?;
        let initrd = self.place_initrd(&kernel, memory_end)?;
        let parameters = self.boot_parameters(&kernel, initrd)?;

        kernel.load(memory, watch)?;
        let pieces = [
            ("boot parameters", BOOT_PARAMETERS, parameters.as_slice()),
            ("command line", COMMAND_LINE, &command_line),
            ("ACPI tables", ACPI, &acpi),
            ("page tables", PAGE_TABLES, &tables::page_tables(self.ram, mask)),
            ("GDT", GDT, &tables::gdt()),
            ("reset vector", RESET_VECTOR, &reset_vector::code()),
        ];
        let initrd = initrd.map(|(gpa, bytes)| ("initrd", gpa, bytes));
        for (what, gpa, bytes) in pieces.into_iter().chain(initrd) {
            write(memory, gpa, bytes, what, watch)?;
        }
        Ok(Entry {
            rip: kernel.entry,
            rsp: STACK_END,
            rsi: BOOT_PARAMETERS,
            cr3: PAGE_TABLES | mask,
            gdt: GDT,
        })
    }

    /// The initrd and its gpa.
    fn place_initrd(&self, kernel: &Kernel<'_>, memory_end: u64) -> Result<Option<(u64, &[u8])>, Error> {
        let Some(initrd) = self.initrd else {
            return Ok(None);
        };
        let last = kernel.header.initrd_addr_max;
        let gpa = layout::place_initrd(initrd.len() as u64, kernel.end, last.into(), memory_end)?;
        Ok(Some((gpa, initrd)))
    }

    /// The boot parameters: zeroes, the kernel's setup header, and what a loader fills in.
    fn boot_parameters(&self, kernel: &Kernel<'_>, initrd: Option<(u64, &[u8])>) -> Result<boot_params, Error> {
        let mut parameters = boot_params {
            hdr: kernel.header,
            acpi_rsdp_addr: ACPI,
            ..Default::default()
        };
        let (gpa, bytes) = initrd.unwrap_or_default();
        parameters.hdr.type_of_loader = LOADER_UNDEFINED;
        parameters.hdr.cmd_line_ptr = low(COMMAND_LINE)?;
        parameters.hdr.ramdisk_image = low(gpa)?;
        parameters.hdr.ramdisk_size = low(bytes.len() as u64)?;
        let map = layout::e820(self.ram);
        parameters.e820_entries = map.len() as u8;
        parameters.e820_table[..map.len()].copy_from_slice(&map);
        Ok(parameters)
    }
}

/// The command line as it is in memory, with a NUL at its end.
fn command_line(line: &str, longest: u32) -> Result<Vec<u8>, Error> {
    let longest = u64::from(longest).min(COMMAND_LINE_ROOM - 1);
    if line.len() as u64 > longest {
        let message = format!(
            "the command line has {} bytes, and this kernel takes {longest}",
            line.len()
        );
        return Err(Error::Invalid(message));
    }
    if let Some(at) = line.find(['\0', '\n', '\r']) {
        let message = format!("the command line has a NUL or a line break after {at} bytes: it must be one line");
        return Err(Error::Invalid(message));
    }
    Ok([line.as_bytes(), b"\0"].concat())
}

/// An address or a size as the boot parameters have it, in 32 bits.
fn low(value: u64) -> Result<u32, Error> {
    u32::try_from(value)
        .map_err(|_| Error::Invalid(format!("{value:#x} is 4 GiB or more: the boot parameters have 32 bits")))
}
