//! The VM, its memory, and its memslots.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_GUEST_MEMFD, KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, kvm_create_guest_memfd, kvm_enable_cap,
    kvm_memory_attributes, kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::abi::{GUEST_MEMFD_MAPPED, KVM_CAP_GUEST_MEMFD_FLAGS, KVM_HC_MAP_GPA_RANGE};
use crate::missing::Handler;
use crate::pages::{Pages, Views};
use crate::plan::{Mode, Plan};
use crate::slots::Slots;
use crate::start::LongMode;

/// One side of guest memory: the file, in which a page's offset is its gpa, and where it is mapped.
pub(crate) struct Side {
    pub file: Arc<File>,
    pub mapping: MmapRegion,
    /// Whether it is a guest_memfd, which memslots take as such.
    pub guest_memfd: bool,
}

pub(crate) struct BareVm {
    pub kvm: Kvm,
    pub fd: VmFd,
    pub plan: Plan,
    pub views: Views,
    pub shared: Side,
    pub private: Side,
    pub long_mode: LongMode,
    /// The memslots that conversions change.
    pub slots: Mutex<Slots>,
    /// Whether there is KVM_SET_USER_MEMORY_REGION2.
    region2: bool,
    /// Ends when the machine does.
    _handler: Option<Handler>,
}

/// Puts what was tried before the error.
fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> io::Error {
    move |error| {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("{what}: {error}"))
    }
}

impl BareVm {
    pub(crate) fn new(plan: &Plan) -> io::Result<Self> {
        let kvm = Kvm::new().map_err(failed("open /dev/kvm"))?;
        let kind = match plan.mode {
            Mode::Attributes | Mode::Traps => KVM_X86_SW_PROTECTED_VM,
            Mode::Memslots => KVM_X86_DEFAULT_VM,
        };
        let fd = kvm.create_vm_with_type(kind.into()).map_err(failed("create a VM"))?;
        if fd.check_extension_raw(KVM_CAP_EXIT_HYPERCALL.into()) & (1 << KVM_HC_MAP_GPA_RANGE) != 0 {
            enable(&fd, KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)?;
        }
        if plan.mode == Mode::Memslots && fd.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) > 0 {
            enable(&fd, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)?;
        }
        let long_mode = LongMode::new(plan.memory, plan.shared_bit)?;
        let mut shared = memfd(plan.memory)?;
        let mut handler = None;
        if !plan.pager.is_empty() {
            shared.mapping = anonymous(plan.memory, libc::PROT_READ | libc::PROT_WRITE)?;
            handler = Some(Handler::start(&plan.pager, &shared.mapping)?);
        }
        let vm = Self {
            shared,
            private: private(&fd, plan)?,
            region2: kvm.check_extension(Cap::UserMemory2),
            slots: Mutex::new(Slots::new(plan)),
            plan: plan.clone(),
            kvm,
            fd,
            views: Views::new(plan.memory, plan.shared_bit),
            long_mode,
            _handler: handler,
        };
        vm.set_up()?;
        Ok(vm)
    }

    /// Creates the first memslots, so that all of memory is shared, and writes the page tables into it.
    fn set_up(&self) -> io::Result<()> {
        let part = self.plan.memory / self.plan.memslots;
        let views: &[bool] = match self.plan.mode {
            Mode::Attributes | Mode::Memslots => &[false],
            Mode::Traps => &[false, true],
        };
        let parts = (0..self.plan.memory).step_by(part as usize);
        let slots = views
            .iter()
            .flat_map(|&private| parts.clone().map(move |start| (start, private)));
        for (id, (start, private)) in slots.enumerate() {
            self.create_slot(id as u32, Pages::new(start, part)?, private)?;
        }
        if self.plan.mode != Mode::Memslots && self.plan.shared_bit.is_some() {
            // The private views: with traps because no page is private, with attributes for good.
            self.set_attributes(Pages::new(0, self.plan.memory)?, true)?;
        }
        let (gpa, tables) = self.long_mode.tables();
        self.load(gpa, tables)
    }

    pub(crate) fn load(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        let slice = self.shared.mapping.get_slice(gpa as usize, bytes.len());
        slice.map_err(io::Error::other)?.copy_from(bytes);
        Ok(())
    }

    pub(crate) fn side(&self, private: bool) -> &Side {
        if private { &self.private } else { &self.shared }
    }

    /// Creates a memslot over the memory of one side, at the view of that side.
    pub(crate) fn create_slot(&self, id: u32, pages: Pages, private: bool) -> io::Result<()> {
        let both_sides = self.plan.mode == Mode::Attributes && self.plan.shared_bit.is_none();
        let offset = pages.start;
        let host = self.side(private).mapping.as_ptr() as u64 + offset;
        let guest_memfd = (both_sides || private) && self.private.guest_memfd;
        let at = self.views.address(pages.start, private);
        let fd = guest_memfd.then(|| (self.private.file.as_raw_fd(), offset));
        self.set_region(id, at, pages.size(), host, fd)
    }

    pub(crate) fn delete_slot(&self, id: u32) -> io::Result<()> {
        self.set_region(id, 0, 0, 0, None)
    }

    fn set_region(&self, slot: u32, gpa: u64, size: u64, host: u64, fd: Option<(i32, u64)>) -> io::Result<()> {
        let what = failed("change a memslot");
        if !self.region2 {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: size,
                userspace_addr: host,
            };
            // SAFETY: `host` is in a mapping of this VM's own memory, which is dropped after `fd`.
            return unsafe { self.fd.set_user_memory_region(region) }.map_err(what);
        }
        let (guest_memfd, guest_memfd_offset) = fd.unwrap_or((-1, 0));
        let region = kvm_userspace_memory_region2 {
            slot,
            flags: if fd.is_some() { KVM_MEM_GUEST_MEMFD } else { 0 },
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: host,
            guest_memfd_offset,
            guest_memfd: guest_memfd as u32,
            ..Default::default()
        };
        // SAFETY: as above.
        unsafe { self.fd.set_user_memory_region2(region) }.map_err(what)
    }

    pub(crate) fn set_attributes(&self, pages: Pages, private: bool) -> io::Result<()> {
        let attributes = kvm_memory_attributes {
            address: pages.start,
            size: pages.size(),
            attributes: if private {
                KVM_MEMORY_ATTRIBUTE_PRIVATE.into()
            } else {
                0
            },
            flags: 0,
        };
        self.fd
            .set_memory_attributes(attributes)
            .map_err(failed("set memory attributes"))
    }

    /// Frees the memory of one side of these pages.
    pub(crate) fn discard(&self, pages: Pages, private: bool) -> io::Result<()> {
        let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (at, size) = (pages.start as libc::off_t, pages.size() as libc::off_t);
        // SAFETY: no memory is passed.
        match unsafe { libc::fallocate(self.side(private).file.as_raw_fd(), flags, at, size) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Frees what KVM's emulation, which does not check attributes, wrote to the side that the pages are not in yet.
    pub(crate) fn clean(&self, pages: Pages, private: bool) -> io::Result<()> {
        let file = self.side(private).file.as_raw_fd();
        // SAFETY: no memory is passed.
        let data = unsafe { libc::lseek(file, pages.start as libc::off_t, libc::SEEK_DATA) };
        match data {
            0.. if (data as u64) < pages.end => self.discard(pages, private),
            _ => Ok(()),
        }
    }
}

fn enable(fd: &VmFd, cap: u32, argument: u64) -> io::Result<()> {
    let cap = kvm_enable_cap {
        cap,
        args: [argument, 0, 0, 0],
        ..Default::default()
    };
    fd.enable_cap(&cap).map_err(failed("enable a capability"))
}

fn memfd(size: u64) -> io::Result<Side> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"bare".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just created this descriptor, and nothing else owns it.
    let file = Arc::new(File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
    file.set_len(size)?;
    Ok(Side {
        mapping: map(&file, size)?,
        file,
        guest_memfd: false,
    })
}

/// The private side. With attributes a guest_memfd, with traps a memfd. With memslots, where KVM's emulation accesses it through a mapping,
/// a guest_memfd that can be mapped, or a memfd where the kernel has none.
fn private(fd: &VmFd, plan: &Plan) -> io::Result<Side> {
    let taken = fd.check_extension_raw(KVM_CAP_GUEST_MEMFD_FLAGS.into()).max(0) as u64;
    let can_map = taken & GUEST_MEMFD_MAPPED == GUEST_MEMFD_MAPPED;
    let flags = match plan.mode {
        Mode::Attributes => 0,
        Mode::Traps => return memfd(plan.memory),
        Mode::Memslots if fd.check_extension_raw(KVM_CAP_GUEST_MEMFD.into()) > 0 && can_map => GUEST_MEMFD_MAPPED,
        Mode::Memslots => return memfd(plan.memory),
    };
    let size = plan.memory;
    let arguments = kvm_create_guest_memfd {
        size,
        flags,
        ..Default::default()
    };
    let raw = fd
        .create_guest_memfd(arguments)
        .map_err(failed("create a guest_memfd"))?;
    // SAFETY: the kernel just created this descriptor, and nothing else owns it.
    let file = Arc::new(File::from(unsafe { OwnedFd::from_raw_fd(raw) }));
    let mapping = match flags {
        // KVM wants a host address for each memslot. Nothing is to be accessed there.
        0 => anonymous(size, libc::PROT_NONE)?,
        _ => map(&file, size)?,
    };
    Ok(Side {
        file,
        mapping,
        guest_memfd: true,
    })
}

fn map(file: &Arc<File>, size: u64) -> io::Result<MmapRegion> {
    let (prot, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_NORESERVE,
    );
    let file = FileOffset::from_arc(file.clone(), 0);
    MmapRegion::build(Some(file), size as usize, prot, flags).map_err(io::Error::other)
}

fn anonymous(size: u64, prot: libc::c_int) -> io::Result<MmapRegion> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    MmapRegion::build(None, size as usize, prot, flags).map_err(io::Error::other)
}
