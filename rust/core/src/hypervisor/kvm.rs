//! /dev/kvm, through the kvm-ioctls crate, and the few ioctls that it does not do as this core needs them.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    KVM_CAP_EXIT_HYPERCALL, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_SYNC_REGS, KVM_CAP_USER_MEMORY2, KVM_MAX_CPUID_ENTRIES, KVM_MEM_GUEST_MEMFD,
    KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd, kvm_enable_cap, kvm_memory_attributes, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region, kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::{ExitFlag, Hypervisor, Limits, Memslot, Vcpu};
use crate::attributes::{PAGE_SIZE, Range, State};
use crate::decode::PAGE_START;
use crate::enforce;
use crate::errno::Errno;
use crate::explicit::KVM_HC_MAP_GPA_RANGE;
use crate::memory::Backing;
use crate::probe::VmType;
use crate::sys;

/// KVM_CAP_GUEST_MEMFD_FLAGS, not in kvm-bindings yet.
pub const CAP_GUEST_MEMFD_FLAGS: u32 = 244;
const SYNC_REGS: i32 = kvm_bindings::KVM_SYNC_X86_REGS as i32;
const CPUID_ADDRESS_SIZES: u32 = 0x8000_0008;
/// Three pages that old Intel CPUs need for real mode; the usual place, just below the firmware's.
const TSS_ADDRESS: u64 = 0xfffb_d000;

/// A virtual machine of KVM.
pub struct KvmVm {
    kvm: Kvm,
    vm: VmFd,
    limits: Limits,
    region2: bool,
    sync_regs: bool,
}

impl KvmVm {
    /// KVM_CREATE_VM with this type, hypercall exits enabled where KVM has them. `memory_end` is the end of the
    /// guest's memory and its views.
    ///
    /// # Errors
    /// Those of opening /dev/kvm and of KVM_CREATE_VM: EINVAL for a type that this host does not have.
    pub fn new(kind: u64, memory_end: u64) -> Result<Self, Errno> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm_with_type(kind)?;
        let cap = |number: u32| vm.check_extension_raw(number.into());
        if cap(KVM_CAP_EXIT_HYPERCALL) & (1 << KVM_HC_MAP_GPA_RANGE) != 0 {
            vm.enable_cap(&kvm_enable_cap {
                cap: KVM_CAP_EXIT_HYPERCALL,
                args: [1 << KVM_HC_MAP_GPA_RANGE, 0, 0, 0],
                ..Default::default()
            })?;
        }
        if kind == u64::from(VmType::Default.number()) && cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE) > 0 {
            // Without it KVM queues #UD besides telling us, and a fetch from the other view kills the guest. Where pages
            // have attributes such a fetch is a memory fault.
            vm.enable_cap(&kvm_enable_cap {
                cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
                args: [1, 0, 0, 0],
                ..Default::default()
            })?;
        }
        if memory_end <= TSS_ADDRESS {
            // Needed only where real mode is not virtualised; elsewhere it changes nothing, so a refusal is none.
            let _ = vm.set_tss_address(TSS_ADDRESS as usize);
        }
        let limits = Limits {
            memslots: kvm.get_nr_memslots() as u32,
            vcpus: kvm.get_max_vcpus() as u32,
            physical_bits: physical_bits(&kvm)?,
            private_attribute: cap(KVM_CAP_MEMORY_ATTRIBUTES) & KVM_MEMORY_ATTRIBUTE_PRIVATE as i32 != 0,
            guest_memfd: cap(KVM_CAP_GUEST_MEMFD) > 0,
            guest_memfd_flags: cap(CAP_GUEST_MEMFD_FLAGS).max(0) as u64,
            pre_fault: cap(KVM_CAP_PRE_FAULT_MEMORY) > 0,
        };
        Ok(Self {
            region2: cap(KVM_CAP_USER_MEMORY2) > 0,
            sync_regs: cap(KVM_CAP_SYNC_REGS) & SYNC_REGS != 0,
            kvm,
            vm,
            limits,
        })
    }

    fn set_region(&self, id: u32, gpa: u64, size: u64, host: u64, fd: Option<(i32, u64)>) -> Result<(), Errno> {
        if !self.region2 {
            let region = kvm_userspace_memory_region {
                slot: id,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: size,
                userspace_addr: host,
            };
            // SAFETY: `host` comes from a `HostAddress`, whose mapping outlives this VM (`machine` drops memory last).
            return Ok(unsafe { self.vm.set_user_memory_region(region) }?);
        }
        let (guest_memfd, guest_memfd_offset) = fd.unwrap_or((-1, 0));
        let region = kvm_userspace_memory_region2 {
            slot: id,
            flags: if fd.is_some() { KVM_MEM_GUEST_MEMFD } else { 0 },
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: host,
            guest_memfd_offset,
            guest_memfd: guest_memfd as u32,
            ..Default::default()
        };
        // SAFETY: as above.
        Ok(unsafe { self.vm.set_user_memory_region2(region) }?)
    }
}

fn physical_bits(kvm: &Kvm) -> Result<u32, Errno> {
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let sizes = cpuid
        .as_slice()
        .iter()
        .find(|entry| entry.function == CPUID_ADDRESS_SIZES);
    // Without the leaf, KVM takes 36 bits as the guest's width.
    Ok(sizes.map_or(36, |entry| entry.eax & 0xff))
}

impl Hypervisor for KvmVm {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<OwnedFd, Errno> {
        let fd = self.vm.create_guest_memfd(kvm_create_guest_memfd {
            size,
            flags,
            ..Default::default()
        })?;
        // SAFETY: the kernel just made this descriptor and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        sys::set_cloexec(&fd)?;
        Ok(fd)
    }

    fn create_memslot(&self, slot: &Memslot<'_>) -> Result<(), Errno> {
        let fd = slot.guest_memfd.map(|(fd, offset)| (fd.as_raw_fd(), offset));
        self.set_region(slot.id, slot.range.gpa(), slot.range.size(), slot.host.get(), fd)
    }

    fn delete_memslot(&self, id: u32) -> Result<(), Errno> {
        self.set_region(id, 0, 0, 0, None)
    }

    fn set_attributes(&self, range: Range, to: State) -> Result<(), Errno> {
        let attributes = kvm_memory_attributes {
            address: range.gpa(),
            size: range.size(),
            attributes: match to {
                State::Private => KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
                State::Shared => 0,
            },
            flags: 0,
        };
        sys::kvm_set_memory_attributes(&self.vm, attributes)
    }

    fn discard(&self, side: &Backing, range: Range) -> Result<(), Errno> {
        if range.size() == PAGE_SIZE {
            return sys::punch_hole(side.file(), range.gpa(), PAGE_SIZE);
        }
        enforce::chunks(range).try_for_each(|chunk| sys::punch_hole(side.file(), chunk.gpa(), chunk.size()))
    }

    fn has_data(&self, side: &Backing, range: Range) -> Result<bool, Errno> {
        side.has_data(range)
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, Errno> {
        let fd = self.vm.create_vcpu(index.into())?;
        let mut cpuid = self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | (index << 24),
                0xb | 0x1f => entry.edx = index,
                _ => {}
            }
        }
        fd.set_cpuid2(&cpuid)?;
        let page = RunPage::map(&fd, self.kvm.get_vcpu_mmap_size()?)?;
        Ok(Box::new(KvmVcpu {
            fd,
            page: Arc::new(page),
            sync_regs: self.sync_regs,
        }))
    }
}

struct KvmVcpu {
    fd: VcpuFd,
    page: Arc<RunPage>,
    sync_regs: bool,
}

impl Vcpu for KvmVcpu {
    #[inline]
    fn run(&mut self) -> Result<(), Errno> {
        // kvm-ioctls decodes as it runs and drops the errno that tells a conversion from a poisoned page.
        sys::kvm_run(&self.fd)
    }

    #[inline]
    fn page(&mut self) -> &mut [u8] {
        // SAFETY: inside the mapping, which is longer.
        let start = unsafe { self.page.base.add(PAGE_START) };
        // SAFETY: the mapping is this long and lives as long as `page`. The kernel writes it only inside KVM_RUN,
        // which takes `&mut self` like this slice does; other threads touch only the bytes before PAGE_START.
        unsafe { std::slice::from_raw_parts_mut(start, self.page.len - PAGE_START) }
    }

    fn exit_flag(&self) -> Arc<dyn ExitFlag> {
        self.page.clone()
    }

    fn syncs_regs(&self) -> bool {
        self.sync_regs
    }

    fn regs(&self) -> Result<kvm_regs, Errno> {
        Ok(self.fd.get_regs()?)
    }

    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), Errno> {
        Ok(self.fd.set_regs(regs)?)
    }

    fn sregs(&self) -> Result<kvm_sregs, Errno> {
        Ok(self.fd.get_sregs()?)
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Errno> {
        Ok(self.fd.set_sregs(sregs)?)
    }

    fn pre_fault(&mut self, range: Range) -> Result<u64, Errno> {
        sys::kvm_pre_fault(&self.fd, range.gpa(), range.size())
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        let translation = self.fd.translate_gva(linear).ok()?;
        (translation.valid != 0).then_some(translation.physical_address)
    }
}

/// The mapping of `struct kvm_run`, shared with whoever kicks.
struct RunPage {
    base: *mut u8,
    len: usize,
}

// SAFETY: through a shared reference only `immediate_exit` is reached, atomically.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

const IMMEDIATE_EXIT: usize = 1;

impl RunPage {
    fn map(vcpu: &VcpuFd, len: usize) -> Result<Self, Errno> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, prot, libc::MAP_SHARED, vcpu.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { base: base.cast(), len })
    }
}

impl ExitFlag for RunPage {
    fn byte(&self) -> &AtomicU8 {
        // SAFETY: inside the mapping; this byte is only ever reached as an atomic.
        let at = unsafe { self.base.add(IMMEDIATE_EXIT) };
        // SAFETY: valid for the mapping's life, aligned (one byte), and atomic for all who use it.
        unsafe { AtomicU8::from_ptr(at) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: this mapping is ours and nothing refers to it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
