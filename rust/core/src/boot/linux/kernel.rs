//! The kernel in a bzImage or an ELF file: what it asks of its loader, and loading it.

use std::fmt::Display;
use std::io::Cursor;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use super::layout::{HIGH_MEMORY, check_kernel};
use super::write::write;
use crate::boot::image::Image;
use crate::error::Error;
use crate::input::Watch;

/// Where the setup header is in a bzImage and in the boot parameters.
const HEADER_OFFSET: usize = 0x1f1;
/// The byte before this is the target of a jump from here to the end of the header.
const HEADER_BASE: usize = 0x202;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// The first boot protocol that has `xloadflags`, which says whether there is an entry point for 64-bit code.
const LEAST_VERSION: u16 = 0x20c;
/// The boot protocol of the header that is made for a vmlinux.
const VERSION: u16 = 0x20f;
/// In `loadflags`: the kernel is loaded above 1 MiB.
const LOADED_HIGH: u8 = 1 << 0;
/// In `xloadflags`: there is an entry point for 64-bit code.
const HAS_64_BIT_ENTRY: u16 = 1 << 0;
/// Where the entry point for 64-bit code is from the load address.
const ENTRY_OFFSET: u64 = 0x200;
const SECTOR: u64 = 512;

// What a bzImage says in its header and a vmlinux does not. The values are those of every x86-64 kernel.

/// The highest address that an initrd may have.
const VMLINUX_INITRD_LAST: u32 = 0x7fff_ffff;
const VMLINUX_ALIGNMENT: u32 = 2 << 20;
/// Bytes of the command line, without the NUL at its end.
const VMLINUX_COMMAND_LINE: u32 = 2047;

/// A kernel and what it asks for.
pub struct Kernel<'a> {
    source: Source<'a>,
    /// The setup header for the boot parameters, without what a loader fills in.
    pub header: setup_header,
    /// The gpa of the first instruction.
    pub entry: u64,
    /// The first gpa past what the kernel occupies while it sets itself up.
    pub end: u64,
}

enum Source<'a> {
    BzImage {
        file: &'a [u8],
        /// The load address.
        gpa: u64,
    },
    Elf(Image<'a>),
}

fn damaged(what: &str) -> Error {
    Error::Invalid(format!("the bzImage cannot be booted, it may be damaged: {what}"))
}

fn not_written(cause: impl Display) -> Error {
    Error::Invalid(format!("the kernel cannot be written to guest memory: {cause}"))
}

/// The setup header of a bzImage: as many bytes as the file says that it has, and zeroes for fields that came later.
fn header(file: &[u8]) -> Option<setup_header> {
    let mut header = setup_header::default();
    let fields = header.as_mut_slice();
    let end = HEADER_BASE + usize::from(*file.get(HEADER_BASE - 1)?);
    let bytes = file.get(HEADER_OFFSET..end.min(HEADER_OFFSET + fields.len()))?;
    fields[..bytes.len()].copy_from_slice(bytes);
    Some(header)
}

impl<'a> Kernel<'a> {
    /// A bzImage, which is loaded at the address that it prefers and entered at its entry point for 64-bit code.
    ///
    /// # Errors
    /// `Invalid` for a file that is none or has no such entry point, for a header that makes no sense, and if the
    /// kernel does not fit below `memory_end`.
    pub fn bzimage(file: &'a [u8], memory_end: u64) -> Result<Self, Error> {
        let mut header = header(file).ok_or_else(|| damaged("it is too short for a setup header"))?;
        let (version, flags) = (header.version, header.xloadflags);
        if header.header != HEADER_MAGIC || header.loadflags & LOADED_HIGH == 0 {
            return Err(damaged("it has no setup header of a bzImage"));
        }
        if version < LEAST_VERSION || flags & HAS_64_BIT_ENTRY == 0 {
            let what = format!(
                "it has no entry point for 64-bit code (boot protocol {}.{:02}, xloadflags {flags:#x})",
                version >> 8,
                version & 0xff
            );
            return Err(damaged(&what));
        }
        let (start, alignment) = (header.pref_address, u64::from(header.kernel_alignment));
        if !alignment.is_power_of_two() || !start.is_multiple_of(alignment) {
            let what = format!("its pref_address, {start:#x}, is no multiple of its kernel_alignment, {alignment:#x}");
            return Err(damaged(&what));
        }
        header.code32_start = u32::try_from(start).map_err(|_| {
            let what = format!("its pref_address, {start:#x}, is above 4 GiB");
            damaged(&what)
        })?;
        // The boot protocol says that 0 means 4.
        let sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
        let setup = (u64::from(sectors) + 1) * SECTOR;
        let size = (file.len() as u64).saturating_sub(setup);
        if size <= ENTRY_OFFSET {
            let what = format!("it has {} bytes, {setup} of which are set-up code", file.len());
            return Err(damaged(&what));
        }
        let end = start + size.max(header.init_size.into());
        check_kernel(start, end, memory_end)?;
        Ok(Self {
            source: Source::BzImage { file, gpa: start },
            header,
            entry: start + ENTRY_OFFSET,
            end,
        })
    }

    /// An ELF file (vmlinux), whose segments are loaded at their physical addresses.
    ///
    /// # Errors
    /// `Invalid` for a file that is none, for segments that do not lie between 1 MiB and `memory_end`, and for an entry
    /// point that does not lie in a segment.
    pub fn elf(file: &'a [u8], memory_end: u64) -> Result<Self, Error> {
        let image = Image::elf(file)?;
        let (mut end, mut has_entry) = (0, false);
        for segment in &image.segments {
            let gpa = segment.gpa;
            // What would end past 2^64 ends outside of memory as well.
            let segment_end = gpa
                .saturating_add(segment.bytes.len() as u64)
                .saturating_add(segment.zeroes);
            if gpa < HIGH_MEMORY || segment_end > memory_end {
                return Err(Error::Invalid(format!(
                    "the vmlinux has a segment at [{gpa:#x}, {segment_end:#x}), and the guest has memory for it from \
                     1 MiB to {memory_end:#x}: give it more memory, or another kernel"
                )));
            }
            end = end.max(segment_end);
            has_entry |= (gpa..segment_end).contains(&image.entry);
        }
        if !has_entry {
            let entry = image.entry;
            let message = format!("the entry point of the vmlinux, {entry:#x}, lies in none of its segments");
            return Err(Error::Invalid(message));
        }
        Ok(Self {
            header: setup_header {
                boot_flag: BOOT_FLAG,
                header: HEADER_MAGIC,
                version: VERSION,
                loadflags: LOADED_HIGH,
                initrd_addr_max: VMLINUX_INITRD_LAST,
                kernel_alignment: VMLINUX_ALIGNMENT,
                cmdline_size: VMLINUX_COMMAND_LINE,
                ..Default::default()
            },
            entry: image.entry,
            source: Source::Elf(image),
            end,
        })
    }

    /// Writes the kernel to `memory`. What is not written must be zeroes, because the kernel's .bss is there.
    ///
    /// # Errors
    /// `Invalid` if `memory` cannot be written, `Interrupted` for a failure of `watch`.
    pub fn load<M: GuestMemoryBackend>(&self, memory: &M, watch: &mut Watch<'_>) -> Result<(), Error> {
        match &self.source {
            Source::BzImage { file, gpa } => {
                let at = Some(GuestAddress(*gpa));
                BzImage::load(memory, at, &mut Cursor::new(file), None).map_err(not_written)?;
            }
            Source::Elf(image) => {
                for segment in &image.segments {
                    write(memory, segment.gpa, segment.bytes, "kernel", watch)?;
                }
            }
        }
        Ok(())
    }
}
