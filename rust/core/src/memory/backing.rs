//! The host memory that backs the guest: the shared side and the private side, a file each.
//!
//! There are no Rust references to guest memory, because the guest may write it at any time. The shared side is read
//! and written by system calls on its file, so a poisoned page gives an errno and not a signal.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Arc, OnceLock};

use rustix::fs::MemfdFlags;
use vm_memory::{VolatileMemory, VolatileSlice};

use super::address::{PAGE_SIZE, Range, State};
use super::missing::{Missing, Side};
use crate::errno::Errno;
use crate::error::Error;
use crate::hypervisor::mapping::{HostAddress, Mapping, Touched};
use crate::hypervisor::raw;
use crate::hypervisor::vm::{FilePart, Hypervisor};

/// KVM_CREATE_GUEST_MEMFD: the file can be mapped by the host. Not in kvm-bindings yet.
pub const GUEST_MEMFD_FLAG_MMAP: u64 = 1;
/// KVM_CREATE_GUEST_MEMFD: its pages start out accessible to the host. Not in kvm-bindings yet.
pub const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 2;

/// A file that backs all of guest memory, in which a page's offset is its gpa, and the addresses for memslots.
#[derive(Debug)]
pub struct Backing {
    file: Arc<File>,
    /// Of the file; for a guest_memfd that the host cannot map, of nothing (PROT_NONE).
    mapping: Arc<Mapping>,
    kind: BackingKind,
    touched: Arc<Touched>,
    /// Its pages that have no bytes yet, if there ever were any; and which side this is.
    missing: OnceLock<(Arc<Missing>, State)>,
}

/// What kind of file backs a side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingKind {
    /// memfd_create(2).
    Memfd,
    /// A guest_memfd that the host cannot map.
    GuestMemfd,
    /// A guest_memfd with MMAP, mapped because KVM's own emulation accesses guest memory through the mapping.
    MappedGuestMemfd,
}

impl Backing {
    fn memfd(name: &str, size: u64) -> Result<Self, Errno> {
        let file = Arc::new(File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?));
        file.set_len(size)?;
        Ok(Self {
            mapping: Arc::new(Mapping::of_file(&file, size)?),
            file,
            kind: BackingKind::Memfd,
            touched: Arc::new(Touched::nothing()),
            missing: OnceLock::new(),
        })
    }

    fn guest_memfd(fd: OwnedFd, size: u64, mapped: bool) -> Result<Self, Errno> {
        let file = Arc::new(File::from(fd));
        let (mapping, kind) = match mapped {
            true => (Mapping::of_file(&file, size)?, BackingKind::MappedGuestMemfd),
            false => (Mapping::inaccessible(size)?, BackingKind::GuestMemfd),
        };
        Ok(Self {
            mapping: Arc::new(mapping),
            file,
            kind,
            touched: Arc::new(Touched::nothing()),
            missing: OnceLock::new(),
        })
    }

    /// What kind of file this is.
    pub fn kind(&self) -> BackingKind {
        self.kind
    }

    /// The descriptor to bind a memslot to, for a guest_memfd.
    pub(crate) fn as_guest_memfd(&self) -> Option<BorrowedFd<'_>> {
        (self.kind != BackingKind::Memfd).then(|| self.file.as_fd())
    }

    /// Whether the host can read and write it at all.
    pub(crate) fn is_reachable(&self) -> bool {
        self.kind != BackingKind::GuestMemfd
    }

    /// Where missing pages are put.
    pub(super) fn side(&self) -> Side {
        Side {
            mapping: self.mapping.clone(),
            touched: self.touched.clone(),
        }
    }

    /// Pages of it come when they are touched, from now on.
    pub(super) fn set_missing(&self, missing: &Arc<Missing>, state: State) {
        // Of a machine that has some already nobody asks this.
        let _ = self.missing.set((missing.clone(), state));
    }

    /// Waits until these pages have their bytes.
    ///
    /// # Errors
    /// EIO where they cannot be had.
    #[inline]
    pub(crate) fn bring(&self, at: u64, len: usize) -> Result<(), Errno> {
        match self.missing.get() {
            None => Ok(()),
            Some((missing, state)) => {
                Range::holding(at, len as u64).map_or(Ok(()), |pages| missing.bring_in_run(*state, pages))
            }
        }
    }

    /// Whether any of these pages is missing.
    pub(crate) fn is_missing(&self, range: Range) -> bool {
        self.missing
            .get()
            .is_some_and(|(missing, state)| missing.is_any_in(*state, range))
    }

    /// These pages are zeroes, as soon as what they have is discarded.
    pub(crate) fn forget_missing(&self, range: Range) {
        if let Some((missing, state)) = self.missing.get() {
            missing.forget(*state, range);
        }
    }

    /// Has `range` of this side's host mapping show the bytes of another side, or its own again. KVM, whose memslots
    /// refer to the mapping, follows. Reads and writes by [`read`](Self::read) and [`write`](Self::write) are as before
    /// where this side is a memfd.
    ///
    /// # Errors
    /// Those of mmap(2), ENOMEM among them.
    pub(crate) fn show(&self, other: &Backing, range: Range) -> Result<(), Errno> {
        // A mapping that is mapped anew does not hold whoever touches what is missing.
        self.bring(range.gpa(), range.size() as usize)?;
        other.bring(range.gpa(), range.size() as usize)?;
        raw::map_over(&self.mapping, range.gpa(), range.size(), &other.file)
    }

    /// The file, for a loader that writes a guest's memory before it runs.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The host address of offset `at`, for a memslot.
    pub(crate) fn host(&self, at: u64) -> HostAddress {
        self.mapping.address(at)
    }

    /// A part of the file, to be discarded or searched for data. The caller has locked the range.
    pub(crate) fn part(&self, range: Range) -> FilePart<'_> {
        FilePart {
            file: &self.file,
            offset: range.gpa(),
            len: range.size(),
            touched: &self.touched,
        }
    }

    /// Bytes that are resident in host memory now. `None` for a guest_memfd where the kernel does not have
    /// cachestat(2), which Linux 6.5 added and a kernel can be built without.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn resident(&self) -> Result<Option<u64>, Errno> {
        const BLOCK: u64 = 512;
        match (raw::cached_pages(self.file.as_raw_fd()), self.kind) {
            (Ok(pages), _) => Ok(Some(pages * PAGE_SIZE)),
            (Err(_), BackingKind::Memfd) => Ok(Some(self.file.metadata()?.blocks() * BLOCK)),
            (Err(_), BackingKind::GuestMemfd | BackingKind::MappedGuestMemfd) => Ok(None),
        }
    }

    /// The bytes from offset `at` on, in this process. A poisoned page ends the process with SIGBUS when it is touched.
    /// `None` for a guest_memfd that the host cannot map.
    pub(crate) fn slice(&self, at: u64, len: usize) -> Option<VolatileSlice<'_>> {
        self.bring(at, len).ok()?;
        self.touched.add(at, len);
        let reachable = self.is_reachable().then(|| self.mapping.slice(at, len));
        reachable?.ok()
    }

    /// Copies bytes from offset `at` on.
    ///
    /// # Errors
    /// EIO where a page is poisoned, or missing and not to be had; EOPNOTSUPP for a guest_memfd that the host cannot map.
    pub fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.bring(at, into.len())?;
        match self.kind {
            BackingKind::Memfd => Ok(self.file.read_exact_at(into, at)?),
            BackingKind::MappedGuestMemfd => {
                // A read through the mapping allocates pages that the file does not have yet.
                self.touched.add(at, into.len());
                self.mapping.slice(at, into.len())?.as_volatile_slice().copy_to(into);
                Ok(())
            }
            BackingKind::GuestMemfd => Err(Errno(libc::EOPNOTSUPP)),
        }
    }

    /// Copies bytes to offset `at` and on.
    ///
    /// # Errors
    /// As [`Backing::read`], and ENOMEM, ENOSPC.
    pub fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        self.bring(at, from.len())?;
        self.touched.add(at, from.len());
        match self.kind {
            BackingKind::Memfd => Ok(self.file.write_all_at(from, at)?),
            BackingKind::MappedGuestMemfd => {
                self.mapping.slice(at, from.len())?.as_volatile_slice().copy_from(from);
                Ok(())
            }
            BackingKind::GuestMemfd => Err(Errno(libc::EOPNOTSUPP)),
        }
    }
}

/// Both sides of guest memory. The bytes of a page are in the side of its state, at its gpa.
#[derive(Debug)]
pub struct Sides {
    /// Backs shared pages.
    pub shared: Backing,
    /// Backs private pages.
    pub private: Backing,
}

impl Sides {
    /// Creates both sides, empty, for memory that ends at `size`. The private side is a guest_memfd where the VM can have
    /// one, unless it is to be `host_memory`: a memfd that the core refuses to read or write for the host. On a VM
    /// without private attributes KVM's emulation accesses every page through a mapping, so there the guest_memfd has
    /// the flags MMAP and INIT_SHARED.
    pub(crate) fn new(size: u64, host_memory: bool, hypervisor: &dyn Hypervisor) -> Result<Self, Error> {
        let can = hypervisor.capabilities();
        let context = |what: &'static str| move |errno| Error::Host { what, errno };
        let mappable = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED;
        let mapped = !can.private_attribute;
        let usable = !mapped || can.guest_memfd_flags & mappable == mappable;
        let private = if can.guest_memfd && usable && !host_memory {
            let flags = if mapped { mappable } else { 0 };
            let fd = hypervisor.create_guest_memfd(size, flags);
            let fd = fd.map_err(context("create a guest_memfd"))?;
            Backing::guest_memfd(fd, size, mapped).map_err(context("map a guest_memfd"))?
        } else {
            Backing::memfd("pagegate-private", size).map_err(context("create the private memory"))?
        };
        Ok(Self {
            shared: Backing::memfd("pagegate-shared", size).map_err(context("create the shared memory"))?,
            private,
        })
    }

    /// The side of the pages in this state.
    pub fn of(&self, state: State) -> &Backing {
        match state {
            State::Shared => &self.shared,
            State::Private => &self.private,
        }
    }
}
