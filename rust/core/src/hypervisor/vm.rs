//! The traits of a virtual machine and of its vCPUs: one method for each ioctl or other system call.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{
    CpuId, Xsave, kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::exit::{self, SENTINEL};
use super::interrupts::Message;
#[cfg(doc)]
use super::interrupts::PINS;
use super::mapping::{HostAddress, Touched};
use crate::errno::Errno;

/// What KVM offers one virtual machine. Queried once, when the VM is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The most memslots at a time (KVM_CAP_NR_MEMSLOTS).
    pub memslots: u32,
    /// The most vCPUs (KVM_CAP_MAX_VCPUS).
    pub vcpus: u32,
    /// Whether KVM_SET_MEMORY_ATTRIBUTES takes PRIVATE on this VM (KVM_CAP_MEMORY_ATTRIBUTES).
    pub private_attribute: bool,
    /// Whether this VM can have a guest_memfd (KVM_CAP_GUEST_MEMFD).
    pub guest_memfd: bool,
    /// Flags that KVM_CREATE_GUEST_MEMFD takes on this VM (KVM_CAP_GUEST_MEMFD_FLAGS).
    pub guest_memfd_flags: u64,
    /// Whether vCPUs have KVM_PRE_FAULT_MEMORY (KVM_CAP_PRE_FAULT_MEMORY).
    pub pre_fault: bool,
}

/// One memslot as KVM_SET_USER_MEMORY_REGION2 takes it. Addresses and sizes are in bytes, multiples of 4096.
#[derive(Clone, Copy, Debug)]
pub struct Memslot<'a> {
    /// The slot's number.
    pub id: u32,
    /// The first guest-physical address.
    pub gpa: u64,
    /// Bytes, more than 0.
    pub size: u64,
    /// Where its first byte is in host memory (userspace_addr).
    pub host: HostAddress,
    /// The guest_memfd, and the offset in it of the slot's first byte.
    pub guest_memfd: Option<(BorrowedFd<'a>, u64)>,
}

/// A part of a file that backs guest memory.
#[derive(Clone, Copy, Debug)]
pub struct FilePart<'a> {
    /// The file.
    pub file: &'a File,
    /// The first byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whether this process itself may have read or written there. The fake has no guest that could have, so it makes
    /// no system call for any other part.
    pub touched: &'a Touched,
}

/// What the interrupt controllers and the timer in the kernel hold.
#[derive(Clone, Deserialize, Serialize)]
pub struct Controllers {
    /// Both 8259s, and the IOAPIC.
    pub chips: [kvm_irqchip; 3],
    /// The PIT.
    pub pit: kvm_pit_state2,
}

/// A virtual machine.
pub trait Hypervisor: Send + Sync {
    /// What KVM offers this VM.
    fn capabilities(&self) -> Capabilities;

    /// KVM_SET_IDENTITY_MAP_ADDR, KVM_CREATE_IRQCHIP and KVM_CREATE_PIT2: interrupt controllers and a timer in the
    /// kernel. Before the first vCPU is created.
    ///
    /// # Errors
    /// The kernel's: EEXIST if there are vCPUs already.
    fn create_interrupt_controllers(&self) -> Result<(), Errno>;

    /// KVM_GET_IRQCHIP of each, and KVM_GET_PIT2.
    ///
    /// # Errors
    /// The kernel's: ENXIO without interrupt controllers.
    fn controllers(&self) -> Result<Controllers, Errno>;

    /// KVM_SET_IRQCHIP of each, and KVM_SET_PIT2.
    ///
    /// # Errors
    /// As [`controllers`](Self::controllers).
    fn set_controllers(&self, controllers: &Controllers) -> Result<(), Errno>;

    /// KVM_GET_CLOCK: the guest's kvmclock.
    ///
    /// # Errors
    /// The kernel's.
    fn clock(&self) -> Result<kvm_clock_data, Errno>;

    /// KVM_SET_CLOCK: kvmclock goes on from there.
    ///
    /// # Errors
    /// The kernel's.
    fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), Errno>;

    /// KVM_GET_MSR_INDEX_LIST: the MSRs that a vCPU's state consists of. A vCPU may lack some of them.
    ///
    /// # Errors
    /// The kernel's.
    fn msr_indices(&self) -> Result<Vec<u32>, Errno>;

    /// KVM_IRQFD: a write to `event` raises this interrupt once, as an edge.
    ///
    /// # Errors
    /// The kernel's: EINVAL without interrupt controllers.
    fn route_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), Errno>;

    /// KVM_SET_GSI_ROUTING: what each interrupt is from now on. The numbers below [`PINS`] stay those of the interrupt
    /// controllers' pins; those from [`PINS`] on are messages, in this order, or nothing.
    ///
    /// # Errors
    /// The kernel's: EINVAL without interrupt controllers or for too many, ENOMEM.
    fn route_messages(&self, messages: &[Option<Message>]) -> Result<(), Errno>;

    /// KVM_IOEVENTFD: a write at `gpa` writes to `event`, and does not exit any more; or it does again.
    ///
    /// # Errors
    /// The kernel's: EEXIST for one that is there, ENOENT for one that is not, ENOSPC for too many.
    fn set_doorbell(&self, event: &EventFd, gpa: u64, on: bool) -> Result<(), Errno>;

    /// KVM_CAP_X86_USER_SPACE_MSR and KVM_X86_SET_MSR_FILTER: reads of `index`, and accesses to every MSR that KVM
    /// does not have, exit to user space.
    ///
    /// # Errors
    /// The kernel's: EINVAL before Linux 5.10.
    fn take_msr(&self, index: u32) -> Result<(), Errno>;

    /// KVM_GET_SUPPORTED_CPUID.
    ///
    /// # Errors
    /// The kernel's.
    fn supported_cpuid(&self) -> Result<CpuId, Errno>;

    /// KVM_CREATE_GUEST_MEMFD; the descriptor is close-on-exec.
    ///
    /// # Errors
    /// The kernel's: EINVAL for a bad size or flags, ENOTTY from a kernel without guest_memfd.
    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<OwnedFd, Errno>;

    /// KVM_SET_USER_MEMORY_REGION2 with a new slot.
    ///
    /// # Errors
    /// The kernel's: EEXIST for an overlap, EINVAL for bad offsets, ENOMEM.
    fn create_memslot(&self, slot: &Memslot<'_>) -> Result<(), Errno>;

    /// KVM_SET_USER_MEMORY_REGION2 with size 0. Waits for an SRCU grace period.
    ///
    /// # Errors
    /// The kernel's: EINVAL where there is no such slot, ENOMEM.
    fn delete_memslot(&self, id: u32) -> Result<(), Errno>;

    /// KVM_SET_MEMORY_ATTRIBUTES: sets or clears PRIVATE on these pages. The ioctl cannot be interrupted, so the caller
    /// bounds the range.
    ///
    /// # Errors
    /// ENOMEM, with nothing changed; EINVAL where the VM has no private memory.
    fn set_memory_attributes(&self, gpa: u64, size: u64, private: bool) -> Result<(), Errno>;

    /// fallocate(FALLOC_FL_PUNCH_HOLE), in calls of at most 2 MiB: frees a part of a file that backs guest memory,
    /// which reads as zeroes afterwards.
    ///
    /// # Errors
    /// Those of fallocate(2).
    fn punch_hole(&self, part: &FilePart<'_>) -> Result<(), Errno>;

    /// lseek(SEEK_DATA): whether a part of a memfd holds data, that is, was written or faulted in since it was last
    /// freed.
    ///
    /// # Errors
    /// Those of lseek(2).
    fn has_data(&self, part: &FilePart<'_>) -> Result<bool, Errno>;

    /// KVM_CREATE_VCPU.
    ///
    /// # Errors
    /// The kernel's.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, Errno>;
}

/// One vCPU. Used by one thread at a time. Getters and setters are named after KVM's ioctls, and their errors are the
/// kernel's.
pub trait Vcpu: Send {
    /// KVM_RUN. The caller has written [`SENTINEL`] into `exit_reason`.
    ///
    /// # Errors
    /// The errno of the ioctl. What it means depends on kvm_run, see [`super::exit`].
    fn run(&mut self) -> Result<(), Errno>;

    /// Writes [`SENTINEL`] into `exit_reason`, calls KVM_RUN, and returns kvm_run. If KVM_RUN failed, its errno is
    /// stored in `errno`, which is otherwise left as it is. (This way the return value fits into registers.)
    #[inline]
    fn enter(&mut self, errno: &mut Errno) -> &mut [u8] {
        exit::put(self.kvm_run(), exit::offset::EXIT_REASON, &SENTINEL.to_le_bytes());
        if let Err(error) = self.run() {
            *errno = error;
        }
        self.kvm_run()
    }

    /// kvm_run from `exit_reason` on, without the first [`exit::START`] bytes, which other threads may write.
    fn kvm_run(&mut self) -> &mut [u8];

    /// `immediate_exit` of this vCPU, for other threads.
    fn immediate_exit(&self) -> Arc<dyn ImmediateExit>;

    /// Its registers, to look at while it is outside of KVM_RUN.
    fn inspect(&self) -> Arc<dyn Inspect>;

    /// Whether KVM copies the general registers to kvm_run at an exit if `kvm_valid_regs` asks for it
    /// (KVM_CAP_SYNC_REGS).
    fn syncs_regs(&self) -> bool;

    /// KVM_GET_REGS: the general registers.
    fn regs(&self) -> Result<kvm_regs, Errno>;

    /// KVM_SET_REGS.
    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), Errno>;

    /// KVM_GET_SREGS: segments, tables and control registers.
    fn sregs(&self) -> Result<kvm_sregs, Errno>;

    /// KVM_SET_SREGS. EINVAL for a combination that no CPU has.
    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Errno>;

    /// KVM_GET_CPUID2: what the guest's CPUID says.
    fn cpuid(&self) -> Result<CpuId, Errno>;

    /// KVM_SET_CPUID2. EINVAL once the vCPU has run.
    fn set_cpuid(&mut self, cpuid: &CpuId) -> Result<(), Errno>;

    /// KVM_GET_MSRS: the values of these MSRs. EINVAL for one that KVM does not have.
    fn msrs(&self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Errno>;

    /// KVM_SET_MSRS, in this order. EINVAL for one that KVM does not have or a value that it refuses; those before it
    /// have been set.
    fn set_msrs(&mut self, msrs: &[kvm_msr_entry]) -> Result<(), Errno>;

    /// KVM_GET_LAPIC: the registers of the local APIC. EINVAL without an in-kernel irqchip.
    fn lapic(&self) -> Result<kvm_lapic_state, Errno>;

    /// KVM_SET_LAPIC. EINVAL without an in-kernel irqchip.
    fn set_lapic(&mut self, lapic: &kvm_lapic_state) -> Result<(), Errno>;

    /// KVM_GET_XSAVE2, or KVM_GET_XSAVE before Linux 5.17: the FPU and vector registers.
    fn xsave(&self) -> Result<Xsave, Errno>;

    /// KVM_SET_XSAVE. EINVAL for a component that the vCPU does not have.
    fn set_xsave(&mut self, xsave: &Xsave) -> Result<(), Errno>;

    /// KVM_GET_XCRS: XCR0.
    fn xcrs(&self) -> Result<kvm_xcrs, Errno>;

    /// KVM_SET_XCRS. EINVAL for a value that the guest's CPUID does not allow.
    fn set_xcrs(&mut self, xcrs: &kvm_xcrs) -> Result<(), Errno>;

    /// KVM_GET_VCPU_EVENTS: exceptions, interrupts and NMIs that are pending.
    fn vcpu_events(&self) -> Result<kvm_vcpu_events, Errno>;

    /// KVM_SET_VCPU_EVENTS.
    fn set_vcpu_events(&mut self, events: &kvm_vcpu_events) -> Result<(), Errno>;

    /// KVM_GET_MP_STATE: runnable, halted, or waiting for INIT or SIPI.
    fn mp_state(&self) -> Result<kvm_mp_state, Errno>;

    /// KVM_SET_MP_STATE. EINVAL for all but runnable without an in-kernel irqchip.
    fn set_mp_state(&mut self, state: kvm_mp_state) -> Result<(), Errno>;

    /// KVM_GET_DEBUGREGS.
    fn debug_regs(&self) -> Result<kvm_debugregs, Errno>;

    /// KVM_SET_DEBUGREGS.
    fn set_debug_regs(&mut self, debug_regs: &kvm_debugregs) -> Result<(), Errno>;

    /// KVM_PRE_FAULT_MEMORY, once. Returns how many bytes were mapped, from the start of the range. It may write the
    /// union of kvm_run.
    ///
    /// # Errors
    /// EINTR, EAGAIN (a memslot is being deleted), ENOENT (shared, no memslot), EFAULT (private, no memslot or no
    /// guest_memfd), and guest_memfd's own: EHWPOISON, ENOMEM.
    fn pre_fault(&mut self, gpa: u64, size: u64) -> Result<u64, Errno>;

    /// KVM_TRANSLATE: the guest-physical address of a linear address, if the guest's page tables map it.
    fn translate(&self, linear: u64) -> Option<u64>;
}

/// What of a vCPU can be read while it is outside of KVM_RUN, also by others than its owner. A call while it is inside
/// waits until it comes out.
pub trait Inspect: Send + Sync {
    /// KVM_GET_REGS.
    ///
    /// # Errors
    /// The kernel's.
    fn regs(&self) -> Result<kvm_regs, Errno>;

    /// KVM_GET_SREGS.
    ///
    /// # Errors
    /// The kernel's.
    fn sregs(&self) -> Result<kvm_sregs, Errno>;

    /// KVM_GET_MSRS of one MSR. EINVAL for one that KVM does not have.
    ///
    /// # Errors
    /// The kernel's.
    fn msr(&self, index: u32) -> Result<u64, Errno>;

    /// KVM_TRANSLATE: the guest-physical address of a linear address, if the guest's page tables map it.
    fn translate(&self, linear: u64) -> Option<u64>;
}

/// `immediate_exit` of one vCPU's kvm_run.
pub trait ImmediateExit: Send + Sync {
    /// The byte, which any thread may write. Unless it is 0, the next KVM_RUN returns EINTR at once; one that runs
    /// already needs a signal.
    fn byte(&self) -> &AtomicU8;
}
