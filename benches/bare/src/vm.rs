//! The machine: a VM, its memory, and its first memslots.
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
use pagegate_core::attributes::{Range, State};
use pagegate_core::boot::{self, Tables};
use pagegate_core::explicit::KVM_HC_MAP_GPA_RANGE;
use pagegate_core::hypervisor::kvm::CAP_GUEST_MEMFD_FLAGS;
use pagegate_core::memory::{GUEST_MEMFD_INIT_SHARED, GUEST_MEMFD_MMAP};
use pagegate_core::views::Views;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::slots::Slots;
use crate::{Mode, Plan};

/// A file behind guest memory, offset by gpa, and where it is mapped.
pub(crate) struct Side {
    pub file: Arc<File>,
    pub mapping: MmapRegion,
    /// Whether slots are bound to it as a guest_memfd.
    pub guest_memfd: bool,
}

pub(crate) struct BareVm {
    pub kvm: Kvm,
    pub fd: VmFd,
    pub plan: Plan,
    pub views: Views,
    pub shared: Side,
    pub private: Side,
    pub tables: Tables,
    /// Those that change.
    pub slots: Mutex<Slots>,
    region2: bool,
}

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
            Mode::Attributes => KVM_X86_SW_PROTECTED_VM,
            Mode::Memslots => KVM_X86_DEFAULT_VM,
        };
        let fd = kvm.create_vm_with_type(kind.into()).map_err(failed("create a VM"))?;
        if fd.check_extension_raw(KVM_CAP_EXIT_HYPERCALL.into()) & (1 << KVM_HC_MAP_GPA_RANGE) != 0 {
            enable(&fd, KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)?;
        }
        if plan.mode == Mode::Memslots && fd.check_extension_raw(KVM_CAP_EXIT_ON_EMULATION_FAILURE.into()) > 0 {
            enable(&fd, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)?;
        }
        let views = crate::views(plan);
        let tables = boot::tables(views).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let vm = Self {
            shared: memfd(plan.memory)?,
            private: private(&fd, plan)?,
            region2: kvm.check_extension(Cap::UserMemory2),
            slots: Mutex::new(Slots::new(plan)),
            plan: plan.clone(),
            kvm,
            fd,
            views,
            tables,
        };
        vm.set_up()?;
        Ok(vm)
    }

    /// All of memory shared, with the page tables in it.
    fn set_up(&self) -> io::Result<()> {
        let part = self.plan.memory / self.plan.memslots;
        for (id, start) in (0..self.plan.memory).step_by(part as usize).enumerate() {
            let range = range(start, part)?;
            self.create_slot(id as u32, range, State::Shared)?;
        }
        if self.plan.mode == Mode::Attributes && self.plan.shared_bit.is_some() {
            self.set_attributes(range(0, self.plan.memory)?, State::Private)?;
        }
        self.load(self.tables.gpa, &self.tables.bytes)
    }

    pub(crate) fn load(&self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        let slice = self.shared.mapping.get_slice(gpa as usize, bytes.len());
        slice.map_err(io::Error::other)?.copy_from(bytes);
        Ok(())
    }

    pub(crate) fn side(&self, state: State) -> &Side {
        match state {
            State::Shared => &self.shared,
            State::Private => &self.private,
        }
    }

    /// Memory of one side, at its view.
    pub(crate) fn create_slot(&self, id: u32, range: Range, state: State) -> io::Result<()> {
        let both_sides = self.plan.mode == Mode::Attributes && self.plan.shared_bit.is_none();
        let offset = range.gpa();
        let host = self.side(state).mapping.as_ptr() as u64 + offset;
        let guest_memfd = (both_sides || state == State::Private) && self.private.guest_memfd;
        let at = self.views.address(range.gpa(), state);
        let fd = guest_memfd.then(|| (self.private.file.as_raw_fd(), offset));
        self.set_region(id, at, range.size(), host, fd)
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
            // SAFETY: `host` lies in a mapping of this VM's own memory, which is dropped after `fd`.
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

    pub(crate) fn set_attributes(&self, range: Range, state: State) -> io::Result<()> {
        let attributes = kvm_memory_attributes {
            address: range.gpa(),
            size: range.size(),
            attributes: match state {
                State::Private => KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
                State::Shared => 0,
            },
            flags: 0,
        };
        self.fd
            .set_memory_attributes(attributes)
            .map_err(failed("set memory attributes"))
    }

    pub(crate) fn discard(&self, range: Range, state: State) -> io::Result<()> {
        let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (at, size) = (range.gpa() as libc::off_t, range.size() as libc::off_t);
        // SAFETY: no memory is passed.
        match unsafe { libc::fallocate(self.side(state).file.as_raw_fd(), flags, at, size) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl BareVm {
    /// Frees what KVM's emulation left on the shared side of private pages, if it left anything.
    pub(crate) fn clean(&self, range: Range) -> io::Result<()> {
        let file = self.shared.file.as_raw_fd();
        // SAFETY: no memory is passed.
        let data = unsafe { libc::lseek(file, range.gpa() as libc::off_t, libc::SEEK_DATA) };
        match data {
            0.. if (data as u64) < range.end() => self.discard(range, State::Shared),
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

pub(crate) fn range(gpa: u64, size: u64) -> io::Result<Range> {
    Range::new(gpa, size).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn memfd(size: u64) -> io::Result<Side> {
    // SAFETY: the name is a C string.
    let fd = unsafe { libc::memfd_create(c"bare".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor and nobody else has it.
    let file = Arc::new(File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
    file.set_len(size)?;
    Ok(Side {
        mapping: map(&file, size)?,
        file,
        guest_memfd: false,
    })
}

/// A guest_memfd; one that can be mapped where KVM reaches private pages through a mapping; memory where there is none.
fn private(fd: &VmFd, plan: &Plan) -> io::Result<Side> {
    let mapped = GUEST_MEMFD_MMAP | GUEST_MEMFD_INIT_SHARED;
    let can_map = fd.check_extension_raw(CAP_GUEST_MEMFD_FLAGS.into()).max(0) as u64 & mapped == mapped;
    let flags = match plan.mode {
        Mode::Attributes => 0,
        Mode::Memslots if fd.check_extension_raw(KVM_CAP_GUEST_MEMFD.into()) > 0 && can_map => mapped,
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
    // SAFETY: the kernel just made this descriptor and nobody else has it.
    let file = Arc::new(File::from(unsafe { OwnedFd::from_raw_fd(raw) }));
    let mapping = match flags {
        // KVM wants an address for each slot.
        0 => MmapRegion::build(
            None,
            size as usize,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
        .map_err(io::Error::other)?,
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
