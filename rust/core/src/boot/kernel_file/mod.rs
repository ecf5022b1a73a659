//! A Linux kernel file for x86-64: a bzImage, or an ELF vmlinux.
//!
//! - [`payload`]: the vmlinux inside of a bzImage
//! - [`symbols`]: its symbols and its code, so that an address of the guest can be given a name

mod foreign;
mod kallsyms;
mod pace;
pub mod payload;
mod setup_header;
pub mod symbols;
mod symtab;
mod table;
mod vmlinux;

use std::fmt;

use self::setup_header::SetupHeader;
use crate::error::Error;

/// The bytes of a file that is a Linux kernel for x86-64, with an entry in 64-bit mode.
#[derive(Clone)]
pub struct KernelFile {
    bytes: Vec<u8>,
    /// Of a bzImage; an ELF vmlinux has none.
    header: Option<SetupHeader>,
}

impl KernelFile {
    /// Checks that `bytes`, a whole file, are a kernel that can be booted.
    ///
    /// # Errors
    /// `Invalid` for any other file, and for a kernel that is cut off, too old, or for another processor. It says what
    /// the file is and what to use instead.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, Error> {
        let header = if Self::looks_like_bzimage(&bytes) {
            Some(SetupHeader::parse(&bytes).map_err(Error::Invalid)?)
        } else if bytes.starts_with(&object::elf::ELFMAG) {
            vmlinux::check(&bytes)?;
            None
        } else {
            return Err(Error::Invalid(foreign::describe(&bytes)));
        };
        Ok(Self { bytes, header })
    }

    /// Whether `bytes`, the first 518 or more of a file, begin as a bzImage does. [`KernelFile::parse`] may still
    /// refuse the file.
    pub fn looks_like_bzimage(bytes: &[u8]) -> bool {
        SetupHeader::is_at_start_of(bytes)
    }

    /// Whether it is a bzImage; otherwise it is an ELF vmlinux.
    pub fn is_bzimage(&self) -> bool {
        self.header.is_some()
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The version that a bzImage's header names, such as "6.1.0-56-cloud-amd64 (...) #1 SMP ...". `None` for a
    /// vmlinux, and where the header names none or one that is not printable ASCII.
    pub fn version(&self) -> Option<&str> {
        self.header.as_ref()?.version(&self.bytes)
    }

    /// The compressed vmlinux of a bzImage, with the word after it that says how large it is uncompressed.
    fn payload(&self) -> Option<&[u8]> {
        self.bytes.get(self.header.as_ref()?.payload.clone())
    }
}

impl fmt::Debug for KernelFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelFile")
            .field("header", &self.header)
            .field("size", &self.bytes.len())
            .finish_non_exhaustive()
    }
}
