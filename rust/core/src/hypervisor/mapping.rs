//! Host memory that memslots may point to.

use std::fs::File;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::errno::Errno;

/// Where in this process a memslot's memory is mapped. Only a [`Mapping`] gives one out, so the address always lies in
/// memory that was mapped for guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddress(u64);

impl HostAddress {
    /// The virtual address, as KVM takes it.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// A range of host virtual addresses that lasts as long as this object.
#[derive(Debug)]
pub struct Mapping(MmapRegion);

impl Mapping {
    /// Maps all of a file of `size` bytes, shared.
    pub(crate) fn of_file(file: &Arc<File>, size: u64) -> Result<Self, Errno> {
        let file = FileOffset::from_arc(file.clone(), 0);
        Self::new(Some(file), size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)
    }

    /// Reserves addresses at which nothing can be read or written. KVM wants an address for each memslot; where the host
    /// cannot map the guest's memory, KVM's emulation must not find other memory there.
    pub(crate) fn inaccessible(size: u64) -> Result<Self, Errno> {
        Self::new(None, size, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
    }

    fn new(file: Option<FileOffset>, size: u64, prot: i32, flags: i32) -> Result<Self, Errno> {
        let size = usize::try_from(size).map_err(|_| Errno(libc::ENOMEM))?;
        let region = MmapRegion::build(file, size, prot, flags | libc::MAP_NORESERVE);
        region.map(Self).map_err(|error| match error {
            MmapRegionError::Mmap(error) => error.into(),
            _ => Errno(libc::EINVAL),
        })
    }

    /// The address of the byte at `offset`.
    pub(crate) fn address(&self, offset: u64) -> HostAddress {
        HostAddress(self.0.as_ptr() as u64 + offset)
    }

    /// A part of it, for copying in and out.
    pub(crate) fn slice(&self, offset: u64, len: usize) -> Result<VolatileSlice<'_>, Errno> {
        self.0.get_slice(offset as usize, len).map_err(|_| Errno(libc::EFAULT))
    }
}
