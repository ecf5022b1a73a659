//! The host memory behind the guest: the shared side and the private side, each one file.
//!
//! No references into guest memory are ever made: the shared side is read and written through its file, so a
//! guest that writes at the same time is a matter of stale bytes and a poisoned page is an error, not a signal.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::attributes::Range;
use crate::errno::Errno;
use crate::hypervisor::Hypervisor;
use crate::{error::Error, sys};

/// KVM_CREATE_GUEST_MEMFD: the file can be mapped by the host.
pub const GUEST_MEMFD_MMAP: u64 = 1;
/// KVM_CREATE_GUEST_MEMFD: its pages start out accessible to the host.
pub const GUEST_MEMFD_INIT_SHARED: u64 = 2;

/// Where in this process a memslot's memory is mapped. Only [`Backing`] makes one, so it always lies in a mapping
/// that this module owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddress(u64);

impl HostAddress {
    /// The virtual address, as KVM takes it.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// A file that backs all of guest memory, offset by gpa, and its mapping where there is one.
#[derive(Debug)]
pub struct Backing {
    file: Arc<File>,
    /// Of the file; for a guest_memfd that the host cannot map, of nothing: KVM wants an address for each slot, and what
    /// it emulates must not find other memory there.
    mapping: MmapRegion,
    kind: BackingKind,
    touched: Touched,
}

/// What this process itself read or wrote: all of it lies between the two.
#[derive(Debug)]
struct Touched {
    start: AtomicU64,
    end: AtomicU64,
}

impl Touched {
    fn nothing() -> Self {
        Self {
            start: AtomicU64::new(u64::MAX),
            end: AtomicU64::new(0),
        }
    }

    fn add(&self, at: u64, len: usize) {
        self.start.fetch_min(at, Ordering::Relaxed);
        self.end.fetch_max(at.saturating_add(len as u64), Ordering::Relaxed);
    }
}

/// What kind of file backs a side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingKind {
    /// memfd_create(2).
    Memfd,
    /// A guest_memfd that the host cannot map.
    GuestMemfd,
    /// A guest_memfd with MMAP, mapped because KVM's own emulation reaches memory through the mapping.
    MappedGuestMemfd,
}

impl Backing {
    fn memfd(name: &std::ffi::CStr, size: u64) -> Result<Self, Errno> {
        let file = Arc::new(File::from(sys::memfd_create(name)?));
        file.set_len(size)?;
        let mapping = map(&file, size)?;
        Ok(Self {
            file,
            mapping,
            kind: BackingKind::Memfd,
            touched: Touched::nothing(),
        })
    }

    fn guest_memfd(fd: OwnedFd, size: u64, mapped: bool) -> Result<Self, Errno> {
        let file = Arc::new(File::from(fd));
        let mapping = if mapped { map(&file, size)? } else { nothing(size)? };
        Ok(Self {
            file,
            mapping,
            kind: if mapped {
                BackingKind::MappedGuestMemfd
            } else {
                BackingKind::GuestMemfd
            },
            touched: Touched::nothing(),
        })
    }

    /// What kind of file this is.
    pub fn kind(&self) -> BackingKind {
        self.kind
    }

    /// The file, for discarding.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The descriptor to bind a slot to, for a guest_memfd.
    pub fn as_guest_memfd(&self) -> Option<BorrowedFd<'_>> {
        (self.kind != BackingKind::Memfd).then(|| self.file.as_fd())
    }

    /// Whether the host can reach these bytes at all.
    pub fn is_reachable(&self) -> bool {
        self.kind != BackingKind::GuestMemfd
    }

    /// The address of offset `at`, as a memslot takes it.
    pub fn host(&self, at: u64) -> HostAddress {
        HostAddress(self.mapping.as_ptr() as u64 + at)
    }

    /// Whether this process, as opposed to a guest, may have put anything here. Whoever asks holds the range.
    pub(crate) fn touched(&self, range: Range) -> bool {
        let (start, end) = (&self.touched.start, &self.touched.end);
        start.load(Ordering::Relaxed) < range.end() && range.gpa() < end.load(Ordering::Relaxed)
    }

    /// Whether anything was ever written to this part of a memfd since it was last discarded.
    pub(crate) fn has_data(&self, range: Range) -> Result<bool, Errno> {
        let data = sys::next_data(&*self.file, range.gpa())?;
        Ok(data.is_some_and(|data| data < range.end()))
    }

    /// Bytes that are resident in memory now; `None` where the kernel does not tell: a guest_memfd is counted by
    /// cachestat(2) alone, which kernels before 6.5 and some small ones lack.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn resident(&self) -> Result<Option<u64>, Errno> {
        const BLOCK: u64 = 512;
        match (sys::cached_pages(self.file.as_raw_fd()), self.kind) {
            (Ok(pages), _) => Ok(Some(pages * crate::attributes::PAGE_SIZE)),
            (Err(_), BackingKind::Memfd) => Ok(Some(self.file.metadata()?.blocks() * BLOCK)),
            (Err(_), BackingKind::GuestMemfd | BackingKind::MappedGuestMemfd) => Ok(None),
        }
    }

    /// Copies out of this side.
    ///
    /// # Errors
    /// EIO where a page is poisoned, EOPNOTSUPP where the host cannot reach this side.
    pub fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        match self.kind {
            BackingKind::Memfd => Ok(self.file.read_exact_at(into, at)?),
            BackingKind::MappedGuestMemfd => {
                // Reading a hole through a mapping fills it.
                self.touched.add(at, into.len());
                let slice = self.mapping.get_slice(at as usize, into.len());
                slice.map_err(|_| Errno(libc::EFAULT))?.copy_to(into);
                Ok(())
            }
            BackingKind::GuestMemfd => Err(Errno(libc::EOPNOTSUPP)),
        }
    }

    /// Copies into this side.
    ///
    /// # Errors
    /// As [`Backing::read`], and ENOMEM, ENOSPC.
    pub fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        self.touched.add(at, from.len());
        match self.kind {
            BackingKind::Memfd => Ok(self.file.write_all_at(from, at)?),
            BackingKind::MappedGuestMemfd => {
                let slice = self.mapping.get_slice(at as usize, from.len());
                slice.map_err(|_| Errno(libc::EFAULT))?.copy_from(from);
                Ok(())
            }
            BackingKind::GuestMemfd => Err(Errno(libc::EOPNOTSUPP)),
        }
    }
}

fn map(file: &Arc<File>, size: u64) -> Result<MmapRegion, Errno> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    reserve(
        Some(FileOffset::from_arc(file.clone(), 0)),
        size,
        prot,
        libc::MAP_SHARED,
    )
}

/// Addresses at which nothing can be read or written.
fn nothing(size: u64) -> Result<MmapRegion, Errno> {
    reserve(None, size, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
}

fn reserve(file: Option<FileOffset>, size: u64, prot: i32, flags: i32) -> Result<MmapRegion, Errno> {
    let size = usize::try_from(size).map_err(|_| Errno(libc::ENOMEM))?;
    MmapRegion::build(file, size, prot, flags | libc::MAP_NORESERVE).map_err(|error| match error {
        vm_memory::mmap::MmapRegionError::Mmap(error) => error.into(),
        _ => Errno(libc::EINVAL),
    })
}

/// Both sides of guest memory. A page's bytes lie in one of them, at its gpa.
#[derive(Debug)]
pub struct GuestMemory {
    /// What the host may see.
    pub shared: Backing,
    /// What it may not.
    pub private: Backing,
}

impl GuestMemory {
    /// Makes both sides, empty. The private side is a guest_memfd where the VM has them, else memory that the
    /// core refuses to give out. Where the VM has no private attribute, KVM reaches a private page like any other,
    /// through a mapping: then the guest_memfd is made with MMAP, INIT_SHARED.
    pub fn new(size: u64, vm: &dyn Hypervisor) -> Result<Self, Error> {
        let limits = vm.limits();
        let context = |what: &'static str| move |errno| Error::Host { what, errno };
        let mapped = GUEST_MEMFD_MMAP | GUEST_MEMFD_INIT_SHARED;
        let private = if limits.private_attribute && limits.guest_memfd {
            let fd = vm
                .create_guest_memfd(size, 0)
                .map_err(context("create a guest_memfd"))?;
            Backing::guest_memfd(fd, size, false).map_err(context("keep a guest_memfd"))?
        } else if limits.guest_memfd && limits.guest_memfd_flags & mapped == mapped {
            let fd = vm
                .create_guest_memfd(size, mapped)
                .map_err(context("create a guest_memfd"))?;
            Backing::guest_memfd(fd, size, true).map_err(context("map a guest_memfd"))?
        } else {
            Backing::memfd(c"pagegate-private", size).map_err(context("create the private memory"))?
        };
        Ok(Self {
            shared: Backing::memfd(c"pagegate-shared", size).map_err(context("create the shared memory"))?,
            private,
        })
    }
}
