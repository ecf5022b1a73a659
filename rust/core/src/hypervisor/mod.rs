//! The seam to the hypervisor: [`kvm`] drives /dev/kvm, [`fake`] replays a script.
//!
//! Everything above this module is the same over both.

pub mod fake;
pub mod kvm;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::attributes::{Range, State};
use crate::decode;
use crate::errno::Errno;
use crate::memory::{Backing, HostAddress};

/// What one virtual machine can do, asked once when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Memslots that may exist at once (KVM_CAP_NR_MEMSLOTS).
    pub memslots: u32,
    /// vCPUs (KVM_CAP_MAX_VCPUS).
    pub vcpus: u32,
    /// Width of a guest-physical address in bits, as the guest's CPUID says.
    pub physical_bits: u32,
    /// Whether KVM_SET_MEMORY_ATTRIBUTES takes PRIVATE on this VM.
    pub private_attribute: bool,
    /// Whether a guest_memfd can be made for this VM.
    pub guest_memfd: bool,
    /// Flags that KVM_CREATE_GUEST_MEMFD takes on this VM (KVM_CAP_GUEST_MEMFD_FLAGS).
    pub guest_memfd_flags: u64,
    /// Whether vCPUs have KVM_PRE_FAULT_MEMORY.
    pub pre_fault: bool,
}

/// One memslot as KVM_SET_USER_MEMORY_REGION2 takes it.
#[derive(Clone, Copy, Debug)]
pub struct Memslot<'a> {
    /// Slot number.
    pub id: u32,
    /// Guest-physical range.
    pub range: Range,
    /// The host memory behind its first byte.
    pub host: HostAddress,
    /// The guest_memfd and the offset in it of the slot's first byte.
    pub guest_memfd: Option<(BorrowedFd<'a>, u64)>,
}

/// A virtual machine.
pub trait Hypervisor: Send + Sync {
    /// What this VM can do.
    fn limits(&self) -> Limits;

    /// KVM_CREATE_GUEST_MEMFD; the descriptor is close-on-exec.
    ///
    /// # Errors
    /// The kernel's: EINVAL for a bad size or flags, ENOTTY where it is not compiled in.
    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<OwnedFd, Errno>;

    /// KVM_SET_USER_MEMORY_REGION2 with a new slot.
    ///
    /// # Errors
    /// The kernel's: EEXIST for an overlap, EINVAL for bad offsets, ENOMEM.
    fn create_memslot(&self, slot: &Memslot<'_>) -> Result<(), Errno>;

    /// KVM_SET_USER_MEMORY_REGION2 with size 0. Waits for a grace period.
    ///
    /// # Errors
    /// The kernel's: EINVAL where there is no such slot, ENOMEM.
    fn delete_memslot(&self, id: u32) -> Result<(), Errno>;

    /// KVM_SET_MEMORY_ATTRIBUTES. Uninterruptible for the whole range: the caller chunks.
    ///
    /// # Errors
    /// ENOMEM changes nothing; EINVAL where the VM has no private memory.
    fn set_attributes(&self, range: Range, to: State) -> Result<(), Errno>;

    /// Frees a part of a side (FALLOC_FL_PUNCH_HOLE); what is read there next is zero. The caller holds the range.
    ///
    /// # Errors
    /// Those of fallocate(2).
    fn discard(&self, side: &Backing, range: Range) -> Result<(), Errno>;

    /// Whether anything was written to this part of a memfd since it was last discarded. The caller holds the range.
    ///
    /// # Errors
    /// Those of lseek(2).
    fn has_data(&self, side: &Backing, range: Range) -> Result<bool, Errno>;

    /// KVM_CREATE_VCPU, with the CPUID that this host supports.
    ///
    /// # Errors
    /// The kernel's.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, Errno>;
}

/// One vCPU. Used by one thread at a time.
pub trait Vcpu: Send {
    /// KVM_RUN. The caller has written its sentinel into `exit_reason`.
    ///
    /// # Errors
    /// The errno of the ioctl; only with the run page does it mean something, see [`crate::decode`].
    fn run(&mut self) -> Result<(), Errno>;

    /// KVM_RUN after the sentinel: the run page as it left it. If it failed, its errno is put into `errno`, which else stays
    /// as it is. (What is returned fits into registers that way.)
    fn enter(&mut self, errno: &mut Errno) -> &mut [u8] {
        decode::put(
            self.page(),
            decode::offset::EXIT_REASON,
            &decode::SENTINEL.to_le_bytes(),
        );
        if let Err(error) = self.run() {
            *errno = error;
        }
        self.page()
    }

    /// The run page from `exit_reason` on, without the first [`crate::decode::PAGE_START`] bytes, which other
    /// threads may write.
    fn page(&mut self) -> &mut [u8];

    /// What makes a running or a coming KVM_RUN return EINTR.
    fn exit_flag(&self) -> Arc<dyn ExitFlag>;

    /// Whether the run page carries the general registers after an exit, if it is asked to (KVM_CAP_SYNC_REGS).
    fn syncs_regs(&self) -> bool;

    /// KVM_GET_REGS.
    ///
    /// # Errors
    /// The kernel's.
    fn regs(&self) -> Result<kvm_regs, Errno>;

    /// KVM_SET_REGS.
    ///
    /// # Errors
    /// The kernel's.
    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), Errno>;

    /// KVM_GET_SREGS.
    ///
    /// # Errors
    /// The kernel's.
    fn sregs(&self) -> Result<kvm_sregs, Errno>;

    /// KVM_SET_SREGS.
    ///
    /// # Errors
    /// The kernel's: EINVAL for a combination no CPU has.
    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Errno>;

    /// KVM_PRE_FAULT_MEMORY, once: how many bytes of the range were mapped. It may write the union of the run page.
    ///
    /// # Errors
    /// EINTR, EAGAIN (a slot is being deleted), ENOENT (shared, no slot), EFAULT (private, no slot or guest_memfd),
    /// and what guest_memfd says: EHWPOISON, ENOMEM.
    fn pre_fault(&mut self, range: Range) -> Result<u64, Errno>;

    /// KVM_TRANSLATE: the guest-physical address of a linear one, if it is mapped.
    fn translate(&self, linear: u64) -> Option<u64>;
}

/// `immediate_exit` of one vCPU's run page.
pub trait ExitFlag: Send + Sync {
    /// Where it is, to be written from any thread: not 0 to have a running or a coming KVM_RUN return EINTR.
    fn byte(&self) -> &AtomicU8;
}
