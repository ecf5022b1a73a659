//! /dev/kvm: through the kvm-ioctls crate, and through `raw` for the ioctls that it lacks or decodes too early.
//!
//! One file: a method for each ioctl, of the VM and of its vCPUs.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES,
    KVM_CAP_PRE_FAULT_MEMORY, KVM_CAP_SYNC_REGS, KVM_CAP_USER_MEMORY2, KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_XSAVE2,
    KVM_MAX_CPUID_ENTRIES, KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN, KVM_X86_DEFAULT_VM, Msrs, Xsave, kvm_clock_data,
    kvm_create_guest_memfd, kvm_debugregs, kvm_enable_cap, kvm_irqchip, kvm_lapic_state, kvm_memory_attributes,
    kvm_mp_state, kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_run, kvm_sregs, kvm_userspace_memory_region,
    kvm_userspace_memory_region2, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{
    IoEventAddress, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, NoDatamatch, VcpuFd, VmFd,
};
use vmm_sys_util::eventfd::EventFd;

use super::exit;
use super::hypercall::KVM_HC_MAP_GPA_RANGE;
use super::interrupts::{self, Message};
use super::raw;
use super::vm::{Capabilities, Controllers, FilePart, Hypervisor, ImmediateExit, Inspect, Memslot, Vcpu};
use crate::errno::Errno;

/// KVM_CAP_GUEST_MEMFD_FLAGS, not in kvm-bindings yet.
pub const CAP_GUEST_MEMFD_FLAGS: u32 = 244;
const SYNC_REGS: i32 = kvm_bindings::KVM_SYNC_X86_REGS as i32;
/// KVM_SET_TSS_ADDR: three pages that Intel CPUs without unrestricted guest need for real mode. The usual address.
const TSS_ADDRESS: u64 = 0xfffb_d000;
/// KVM_SET_IDENTITY_MAP_ADDR: a page that they need in protected mode without paging, before the TSS.
const IDENTITY_MAP: u64 = TSS_ADDRESS - 0x1000;
/// The addresses of both.
pub const TSS_AND_IDENTITY_MAP: std::ops::Range<u64> = IDENTITY_MAP..TSS_ADDRESS + 0x3000;
/// KVM_CAP_X86_USER_SPACE_MSR: why an access to an MSR exits.
const MSR_EXITS: u64 = (KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER) as u64;

/// The most bytes of one fallocate call: it cannot be interrupted, and every vCPU that faults in its range waits for
/// it.
const MAX_PUNCHED: u64 = 2 << 20;

/// A virtual machine of KVM.
pub struct KvmVm {
    kvm: Kvm,
    vm: VmFd,
    capabilities: Capabilities,
    /// KVM_CAP_USER_MEMORY2: whether there is KVM_SET_USER_MEMORY_REGION2.
    region2: bool,
    sync_regs: bool,
}

impl KvmVm {
    /// KVM_CREATE_VM with this type. Enables the exits that the core needs, where KVM has them. `with_tss`: the guest
    /// has no memory at [`TSS_AND_IDENTITY_MAP`].
    ///
    /// # Errors
    /// Those of opening /dev/kvm and of KVM_CREATE_VM: EINVAL for a type that this host does not have.
    pub fn new(kind: u64, with_tss: bool) -> Result<Self, Errno> {
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
        if kind == u64::from(KVM_X86_DEFAULT_VM) && cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE) > 0 {
            // Without it KVM also injects #UD when it cannot fetch an instruction, and a fetch from the view that the
            // page is not in kills the guest. With attributes such a fetch is a memory fault.
            vm.enable_cap(&kvm_enable_cap {
                cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
                args: [1, 0, 0, 0],
                ..Default::default()
            })?;
        }
        if with_tss {
            // Only CPUs without unrestricted guest need it. On others an error does not matter.
            let _ = vm.set_tss_address(TSS_ADDRESS as usize);
        }
        let capabilities = Capabilities {
            memslots: kvm.get_nr_memslots() as u32,
            vcpus: kvm.get_max_vcpus() as u32,
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
            capabilities,
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

impl Hypervisor for KvmVm {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn create_interrupt_controllers(&self) -> Result<(), Errno> {
        self.vm.set_identity_map_address(IDENTITY_MAP)?;
        self.vm.create_irq_chip()?;
        Ok(self.vm.create_pit2(kvm_pit_config::default())?)
    }

    fn controllers(&self) -> Result<Controllers, Errno> {
        let mut chips = [0, 1, 2].map(|chip_id| kvm_irqchip {
            chip_id,
            ..Default::default()
        });
        for chip in &mut chips {
            self.vm.get_irqchip(chip)?;
        }
        let pit = self.vm.get_pit2()?;
        Ok(Controllers { chips, pit })
    }

    fn set_controllers(&self, controllers: &Controllers) -> Result<(), Errno> {
        for chip in &controllers.chips {
            self.vm.set_irqchip(chip)?;
        }
        Ok(self.vm.set_pit2(&controllers.pit)?)
    }

    fn clock(&self) -> Result<kvm_clock_data, Errno> {
        Ok(self.vm.get_clock()?)
    }

    fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), Errno> {
        // The flags say how exact it was when it was read.
        Ok(self.vm.set_clock(&kvm_clock_data {
            clock: clock.clock,
            ..Default::default()
        })?)
    }

    fn msr_indices(&self) -> Result<Vec<u32>, Errno> {
        Ok(self.kvm.get_msr_index_list()?.as_slice().to_vec())
    }

    fn route_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), Errno> {
        Ok(self.vm.register_irqfd(event, gsi)?)
    }

    fn route_messages(&self, messages: &[Option<Message>]) -> Result<(), Errno> {
        Ok(self.vm.set_gsi_routing(&interrupts::routing(messages)?)?)
    }

    fn set_doorbell(&self, event: &EventFd, gpa: u64, on: bool) -> Result<(), Errno> {
        let address = IoEventAddress::Mmio(gpa);
        Ok(match on {
            true => self.vm.register_ioevent(event, &address, NoDatamatch),
            false => self.vm.unregister_ioevent(event, &address, NoDatamatch),
        }?)
    }

    fn take_msr(&self, index: u32) -> Result<(), Errno> {
        self.vm.enable_cap(&kvm_enable_cap {
            cap: KVM_CAP_X86_USER_SPACE_MSR,
            args: [MSR_EXITS, 0, 0, 0],
            ..Default::default()
        })?;
        let denied = MsrFilterRange {
            flags: MsrFilterRangeFlags::READ,
            base: index,
            msr_count: 1,
            bitmap: &[0],
        };
        Ok(self.vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[denied])?)
    }

    fn supported_cpuid(&self) -> Result<CpuId, Errno> {
        Ok(self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)
    }

    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<OwnedFd, Errno> {
        let fd = self.vm.create_guest_memfd(kvm_create_guest_memfd {
            size,
            flags,
            ..Default::default()
        })?;
        // SAFETY: the kernel just created this descriptor, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        raw::set_cloexec(&fd)?;
        Ok(fd)
    }

    fn create_memslot(&self, slot: &Memslot<'_>) -> Result<(), Errno> {
        let fd = slot.guest_memfd.map(|(fd, offset)| (fd.as_raw_fd(), offset));
        self.set_region(slot.id, slot.gpa, slot.size, slot.host.get(), fd)
    }

    fn delete_memslot(&self, id: u32) -> Result<(), Errno> {
        self.set_region(id, 0, 0, 0, None)
    }

    fn set_memory_attributes(&self, gpa: u64, size: u64, private: bool) -> Result<(), Errno> {
        let attributes = kvm_memory_attributes {
            address: gpa,
            size,
            attributes: if private {
                KVM_MEMORY_ATTRIBUTE_PRIVATE.into()
            } else {
                0
            },
            flags: 0,
        };
        raw::kvm_set_memory_attributes(&self.vm, attributes)
    }

    fn punch_hole(&self, part: &FilePart<'_>) -> Result<(), Errno> {
        let (mut offset, end) = (part.offset, part.offset + part.len);
        while offset < end {
            let next = (offset - offset % MAX_PUNCHED + MAX_PUNCHED).min(end);
            raw::punch_hole(part.file, offset, next - offset)?;
            offset = next;
        }
        Ok(())
    }

    fn has_data(&self, part: &FilePart<'_>) -> Result<bool, Errno> {
        raw::has_data(part.file, part.offset, part.len)
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, Errno> {
        let fd = self.vm.create_vcpu(index.into())?;
        let kvm_run = KvmRunMapping::map(&fd, self.kvm.get_vcpu_mmap_size()?)?;
        // After the first vCPU was created: from then on the kernel refuses this process further XSAVE features for
        // guests (arch_prctl), so the size does not change any more.
        let xsave_size = self.vm.check_extension_raw(KVM_CAP_XSAVE2.into()).max(0);
        Ok(Box::new(KvmVcpu {
            fd: Arc::new(Registers(fd)),
            kvm_run: Arc::new(kvm_run),
            sync_regs: self.sync_regs,
            xsave_size: xsave_size as usize,
        }))
    }
}

/// A vCPU's descriptor.
struct Registers(VcpuFd);

impl Registers {
    fn msrs(&self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Errno> {
        let entry = |index: &u32| kvm_msr_entry {
            index: *index,
            ..Default::default()
        };
        let entries: Vec<_> = indices.iter().map(entry).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| Errno(libc::E2BIG))?;
        // The kernel stops at the first MSR that it does not have, and returns how many it read.
        match self.0.get_msrs(&mut msrs)? {
            read if read == indices.len() => Ok(msrs.as_slice().to_vec()),
            _ => Err(Errno(libc::EINVAL)),
        }
    }
}

impl Inspect for Registers {
    fn regs(&self) -> Result<kvm_regs, Errno> {
        Ok(self.0.get_regs()?)
    }

    fn sregs(&self) -> Result<kvm_sregs, Errno> {
        Ok(self.0.get_sregs()?)
    }

    fn msr(&self, index: u32) -> Result<u64, Errno> {
        let msrs = self.msrs(&[index])?;
        msrs.first().map(|msr| msr.data).ok_or(Errno(libc::EINVAL))
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        let translation = self.0.translate_gva(linear).ok()?;
        (translation.valid != 0).then_some(translation.physical_address)
    }
}

struct KvmVcpu {
    fd: Arc<Registers>,
    kvm_run: Arc<KvmRunMapping>,
    sync_regs: bool,
    /// KVM_CAP_XSAVE2: the size of KVM_GET_XSAVE2's buffer in bytes; 0 before Linux 5.17.
    xsave_size: usize,
}

impl KvmVcpu {
    /// A buffer for KVM_GET_XSAVE2 and KVM_SET_XSAVE.
    fn xsave_buffer(&self) -> Result<Xsave, Errno> {
        let more = self.xsave_size.saturating_sub(size_of::<kvm_xsave>());
        Xsave::new(more.div_ceil(size_of::<u32>())).map_err(|_| Errno(libc::ENOMEM))
    }
}

impl Vcpu for KvmVcpu {
    #[inline]
    fn run(&mut self) -> Result<(), Errno> {
        // kvm-ioctls decodes the exit itself and drops the errno, which tells EFAULT from EHWPOISON.
        raw::kvm_run(&self.fd.0)
    }

    #[inline]
    fn kvm_run(&mut self) -> &mut [u8] {
        // SAFETY: inside of the mapping, which is longer.
        let start = unsafe { self.kvm_run.base.add(exit::START) };
        // SAFETY: the mapping is this long and lives as long as `kvm_run`. The kernel writes it only in KVM_RUN and
        // KVM_PRE_FAULT_MEMORY, which take `&mut self` as this method does; other threads touch only the bytes before
        // `exit::START`.
        unsafe { std::slice::from_raw_parts_mut(start, self.kvm_run.len - exit::START) }
    }

    fn immediate_exit(&self) -> Arc<dyn ImmediateExit> {
        self.kvm_run.clone()
    }

    fn inspect(&self) -> Arc<dyn Inspect> {
        self.fd.clone()
    }

    fn syncs_regs(&self) -> bool {
        self.sync_regs
    }

    fn regs(&self) -> Result<kvm_regs, Errno> {
        self.fd.regs()
    }

    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), Errno> {
        Ok(self.fd.0.set_regs(regs)?)
    }

    fn sregs(&self) -> Result<kvm_sregs, Errno> {
        self.fd.sregs()
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Errno> {
        Ok(self.fd.0.set_sregs(sregs)?)
    }

    fn cpuid(&self) -> Result<CpuId, Errno> {
        Ok(self.fd.0.get_cpuid2(KVM_MAX_CPUID_ENTRIES)?)
    }

    fn set_cpuid(&mut self, cpuid: &CpuId) -> Result<(), Errno> {
        Ok(self.fd.0.set_cpuid2(cpuid)?)
    }

    fn msrs(&self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Errno> {
        self.fd.msrs(indices)
    }

    fn set_msrs(&mut self, msrs: &[kvm_msr_entry]) -> Result<(), Errno> {
        let entries = Msrs::from_entries(msrs).map_err(|_| Errno(libc::E2BIG))?;
        match self.fd.0.set_msrs(&entries)? {
            written if written == msrs.len() => Ok(()),
            _ => Err(Errno(libc::EINVAL)),
        }
    }

    fn lapic(&self) -> Result<kvm_lapic_state, Errno> {
        Ok(self.fd.0.get_lapic()?)
    }

    fn set_lapic(&mut self, lapic: &kvm_lapic_state) -> Result<(), Errno> {
        Ok(self.fd.0.set_lapic(lapic)?)
    }

    fn xsave(&self) -> Result<Xsave, Errno> {
        let mut xsave = self.xsave_buffer()?;
        if self.xsave_size == 0 {
            // Before Linux 5.17 there is only the fixed part.
            xsave.as_mut_slice().fill(0);
            let plain = self.fd.0.get_xsave()?;
            // SAFETY: only the fixed part is written, so the wrapper's length stays right.
            unsafe { xsave.as_mut_fam_struct() }.xsave = plain;
            return Ok(xsave);
        }
        // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 gave, which does not grow any more (see `create_vcpu`).
        unsafe { self.fd.0.get_xsave2(&mut xsave) }?;
        Ok(xsave)
    }

    fn set_xsave(&mut self, xsave: &Xsave) -> Result<(), Errno> {
        let needed = self.xsave_buffer()?.as_slice().len();
        if xsave.as_slice().len() < needed {
            return Err(Errno(libc::EINVAL));
        }
        // SAFETY: the buffer has at least the size that KVM reads, which was checked just now.
        Ok(unsafe { self.fd.0.set_xsave2(xsave) }?)
    }

    fn xcrs(&self) -> Result<kvm_xcrs, Errno> {
        Ok(self.fd.0.get_xcrs()?)
    }

    fn set_xcrs(&mut self, xcrs: &kvm_xcrs) -> Result<(), Errno> {
        Ok(self.fd.0.set_xcrs(xcrs)?)
    }

    fn vcpu_events(&self) -> Result<kvm_vcpu_events, Errno> {
        Ok(self.fd.0.get_vcpu_events()?)
    }

    fn set_vcpu_events(&mut self, events: &kvm_vcpu_events) -> Result<(), Errno> {
        Ok(self.fd.0.set_vcpu_events(events)?)
    }

    fn mp_state(&self) -> Result<kvm_mp_state, Errno> {
        Ok(self.fd.0.get_mp_state()?)
    }

    fn set_mp_state(&mut self, state: kvm_mp_state) -> Result<(), Errno> {
        Ok(self.fd.0.set_mp_state(state)?)
    }

    fn debug_regs(&self) -> Result<kvm_debugregs, Errno> {
        Ok(self.fd.0.get_debug_regs()?)
    }

    fn set_debug_regs(&mut self, debug_regs: &kvm_debugregs) -> Result<(), Errno> {
        Ok(self.fd.0.set_debug_regs(debug_regs)?)
    }

    fn pre_fault(&mut self, gpa: u64, size: u64) -> Result<u64, Errno> {
        raw::kvm_pre_fault(&self.fd.0, gpa, size)
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        self.fd.translate(linear)
    }
}

/// The mapping of kvm_run. Shared, because other threads write its `immediate_exit`.
struct KvmRunMapping {
    base: *mut u8,
    len: usize,
}

// SAFETY: through a shared reference only `immediate_exit` is accessed, as an atomic.
unsafe impl Send for KvmRunMapping {}
// SAFETY: as above.
unsafe impl Sync for KvmRunMapping {}

const IMMEDIATE_EXIT: usize = std::mem::offset_of!(kvm_run, immediate_exit);

impl KvmRunMapping {
    fn map(vcpu: &VcpuFd, len: usize) -> Result<Self, Errno> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, prot, libc::MAP_SHARED, vcpu.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { base: base.cast(), len })
    }
}

impl ImmediateExit for KvmRunMapping {
    fn byte(&self) -> &AtomicU8 {
        // SAFETY: inside of the mapping.
        let at = unsafe { self.base.add(IMMEDIATE_EXIT) };
        // SAFETY: valid while the mapping lives, aligned (one byte), and this process accesses it only as an atomic.
        unsafe { AtomicU8::from_ptr(at) }
    }
}

impl Drop for KvmRunMapping {
    fn drop(&mut self) {
        // SAFETY: this object owns the mapping, and nothing refers to it any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
