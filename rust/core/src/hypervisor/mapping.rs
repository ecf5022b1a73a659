//! Mappings of host memory that memslots refer to.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::mmap::MmapRegionError;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::errno::Errno;

/// Where in this process a memslot's memory is mapped. Only a [`Mapping`] makes one, so it is always an address of
/// memory that was mapped for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddress(u64);

impl HostAddress {
    /// The virtual address, as in `userspace_addr`.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// A range of host virtual addresses, mapped as long as this object lives.
#[derive(Debug)]
pub struct Mapping(MmapRegion);

impl Mapping {
    /// Maps all of a file of `size` bytes (MAP_SHARED).
    pub(crate) fn of_file(file: &Arc<File>, size: u64) -> Result<Self, Errno> {
        let file = FileOffset::from_arc(file.clone(), 0);
        Self::new(Some(file), size, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)
    }

    /// Maps the first `size` bytes of a file that is only read (MAP_PRIVATE). Where it is cut off later, this process must not
    /// touch it itself: that would be SIGBUS.
    pub(crate) fn of_source(file: &Arc<File>, size: u64) -> Result<Self, Errno> {
        let file = FileOffset::from_arc(file.clone(), 0);
        Self::new(Some(file), size, libc::PROT_READ, libc::MAP_PRIVATE)
    }

    /// Reserves addresses with PROT_NONE. KVM wants a host address for each memslot; where the host cannot map the
    /// guest's memory, KVM's emulation must not reach other memory at that address.
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

    /// Where in it a virtual address is.
    pub(crate) fn offset_of(&self, address: u64) -> Option<u64> {
        let offset = address.checked_sub(self.address(0).get())?;
        (offset < self.size()).then_some(offset)
    }

    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.0.size() as u64
    }

    /// A part of it, to copy from or to.
    pub(crate) fn slice(&self, offset: u64, len: usize) -> Result<VolatileSlice<'_>, Errno> {
        self.0.get_slice(offset as usize, len).map_err(|_| Errno(libc::EFAULT))
    }
}

/// The smallest range that contains everything that this process itself read or wrote.
#[derive(Debug)]
pub struct Touched {
    start: AtomicU64,
    end: AtomicU64,
}

impl Touched {
    pub(crate) fn nothing() -> Self {
        Self {
            start: AtomicU64::new(u64::MAX),
            end: AtomicU64::new(0),
        }
    }

    pub(crate) fn add(&self, at: u64, len: usize) {
        self.start.fetch_min(at, Ordering::Relaxed);
        self.end.fetch_max(at.saturating_add(len as u64), Ordering::Relaxed);
    }

    /// Whether any of these bytes may be among them.
    pub(crate) fn overlaps(&self, offset: u64, len: u64) -> bool {
        self.start.load(Ordering::Relaxed) < offset + len && offset < self.end.load(Ordering::Relaxed)
    }
}
