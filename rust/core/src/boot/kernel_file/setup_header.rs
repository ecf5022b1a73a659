//! The setup header of a bzImage (Documentation/arch/x86/boot.rst of Linux), as far as it says what the file is.

use std::ops::Range;

/// Offsets in the file.
const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const LOADFLAGS: usize = 0x211;
const XLOADFLAGS: usize = 0x236;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// Where the header of protocol 2.12 ends.
const END: usize = 0x268;

const SECTOR: usize = 512;
/// What a setup_sects of 0 stands for.
const DEFAULT_SETUP_SECTS: u8 = 4;
/// The first protocol with xloadflags.
const OLDEST_PROTOCOL: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// Bytes of a version that are looked at. Real ones have some 150.
const LONGEST_VERSION: usize = 512;

#[derive(Clone, Debug)]
pub(super) struct SetupHeader {
    /// Where the compressed vmlinux is in the file. Empty if the header names none.
    pub(super) payload: Range<usize>,
    /// Where the version's text may be in the file; it ends with a NUL in there.
    version: Range<usize>,
}

impl SetupHeader {
    pub(super) fn is_at_start_of(bytes: &[u8]) -> bool {
        bytes.get(BOOT_FLAG..BOOT_FLAG + 2) == Some(&[0x55, 0xaa]) && bytes.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
    }

    /// Reads the header of a file that begins like a bzImage, or says why the kernel cannot be booted.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let Some(header) = bytes.first_chunk::<END>() else {
            return Err(cut_off(bytes.len(), END));
        };
        let byte = |at: usize| header[at];
        let half = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize;

        let protocol = half(VERSION);
        if protocol < OLDEST_PROTOCOL {
            return Err(format!(
                "the kernel has boot protocol {}.{:02}, which knows no 64-bit entry; use a kernel for x86-64 from \
                 Linux 3.8 or later (protocol 2.12)",
                protocol >> 8,
                protocol & 0xff
            ));
        }
        if byte(LOADFLAGS) & LOADED_HIGH == 0 {
            return Err("the kernel is a zImage, which is loaded below 1 MiB; use a bzImage".to_owned());
        }
        if half(XLOADFLAGS) & XLF_KERNEL_64 == 0 {
            return Err(
                "the kernel is a 32-bit one: its header has no XLF_KERNEL_64; use one that was built for x86-64 \
                 (CONFIG_X86_64=y)"
                    .to_owned(),
            );
        }
        let sectors = match byte(SETUP_SECTS) {
            0 => DEFAULT_SETUP_SECTS,
            sectors => sectors,
        };
        let setup = (usize::from(sectors) + 1) * SECTOR;
        let end = setup + word(SYSSIZE) * 16;
        if bytes.len() < end {
            return Err(cut_off(bytes.len(), end));
        }
        let (offset, length) = (word(PAYLOAD_OFFSET), word(PAYLOAD_LENGTH));
        let payload = setup + offset..setup + offset + length;
        if payload.end > bytes.len() {
            return Err(format!(
                "the bzImage is damaged: its header says that the compressed kernel ends at byte {}, and the file has \
                 {}; copy it again",
                payload.end,
                bytes.len()
            ));
        }
        let version = match usize::from(half(KERNEL_VERSION)) {
            0 => 0..0,
            at => at + SECTOR..setup.min(at + SECTOR + LONGEST_VERSION),
        };
        Ok(Self { payload, version })
    }

    pub(super) fn version<'a>(&self, bytes: &'a [u8]) -> Option<&'a str> {
        let text = bytes.get(self.version.clone())?;
        let text = text.split_at(text.iter().position(|&byte| byte == 0)?).0;
        let printable = !text.is_empty() && text.iter().all(|byte| (b' '..=b'~').contains(byte));
        printable.then_some(std::str::from_utf8(text).ok()?)
    }
}

fn cut_off(has: usize, needs: usize) -> String {
    format!("the bzImage is cut off: the file has {has} bytes, and its header says at least {needs}; copy it again")
}
