//! System calls that no crate makes in the way that this core needs, a function each.
//!
//! Those that every request makes go through rustix and not the C library, which saves some 130 instructions a request.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use kvm_bindings::{KVMIO, kvm_memory_attributes, kvm_pre_fault_memory};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, Setter, Updater, opcode};

use crate::errno::Errno;

const KVM_RUN: Opcode = opcode::none(KVMIO as u8, 0x80);
const KVM_SET_MEMORY_ATTRIBUTES: Opcode = opcode::write::<kvm_memory_attributes>(KVMIO as u8, 0xd2);
/// The kernel advances `gpa` and `size`.
const KVM_PRE_FAULT_MEMORY: Opcode = opcode::read_write::<kvm_pre_fault_memory>(KVMIO as u8, 0xd5);

/// cachestat(2): how many pages of a file are in the page cache.
pub(crate) fn cached_pages(fd: RawFd) -> Result<u64, Errno> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let whole_file = [0u64; 2];
    let mut counts = [0u64; 5];
    // SAFETY: both arrays have the layout of the call's structures and outlive it.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, fd, whole_file.as_ptr(), counts.as_mut_ptr(), 0) };
    if result < 0 {
        return Err(Errno::last());
    }
    Ok(counts[0])
}

/// fallocate(2): frees a part of a file and keeps its size.
#[inline]
pub(crate) fn punch_hole(file: impl AsFd, offset: u64, len: u64) -> Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match rustix::fs::fallocate(file.as_fd(), flags, offset, len) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// lseek(2) with SEEK_DATA: whether there is data in `[offset, offset + len)`. Moves the file's position, which nothing
/// depends on.
#[inline]
pub(crate) fn has_data(file: impl AsFd, offset: u64, len: u64) -> Result<bool, Errno> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(found) => Ok(found < offset + len),
        Err(rustix::io::Errno::NXIO) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The calling thread's id, for [`signal_thread`].
pub(crate) fn thread_id() -> libc::pid_t {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// tgkill(2) of a thread of this process. The caller makes sure that the thread still exists.
pub(crate) fn signal_thread(thread: libc::pid_t, signal: libc::c_int) {
    let process = std::process::id();
    // SAFETY: no memory is passed. For a thread that has ended the call fails with ESRCH and does nothing.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
}

/// fcntl(2): sets FD_CLOEXEC.
pub(crate) fn set_cloexec(fd: &OwnedFd) -> Result<(), Errno> {
    Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?)
}

/// The ioctl KVM_RUN: no argument, but the kernel writes kvm_run.
struct KvmRun;

// SAFETY: the opcode takes no argument. `IS_MUTATING` tells the compiler that the call writes memory: without it, it
// may assume that kvm_run holds the same before and after.
unsafe impl Ioctl for KvmRun {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        KVM_RUN
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::null_mut()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// KVM_RUN, with its errno. The caller has exclusive access to kvm_run.
#[inline]
pub(crate) fn kvm_run(vcpu: &VcpuFd) -> Result<(), Errno> {
    // SAFETY: `vcpu` owns the descriptor and is borrowed meanwhile.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    // SAFETY: the descriptor is a vCPU's, and KVM_RUN is an ioctl of vCPUs.
    Ok(unsafe { ioctl::ioctl(fd, KvmRun) }?)
}

/// KVM_SET_MEMORY_ATTRIBUTES.
#[inline]
pub(crate) fn kvm_set_memory_attributes(vm: &VmFd, attributes: kvm_memory_attributes) -> Result<(), Errno> {
    // SAFETY: `vm` owns the descriptor and is borrowed meanwhile.
    let fd = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
    // SAFETY: the opcode takes this argument, which the kernel only reads.
    let request = unsafe { Setter::<KVM_SET_MEMORY_ATTRIBUTES, _>::new(attributes) };
    // SAFETY: as above, and the descriptor is a VM's.
    Ok(unsafe { ioctl::ioctl(fd, request) }?)
}

/// KVM_PRE_FAULT_MEMORY, once: how many bytes it mapped. kvm-ioctls does not have it.
pub(crate) fn kvm_pre_fault(vcpu: &VcpuFd, gpa: u64, size: u64) -> Result<u64, Errno> {
    // SAFETY: `vcpu` owns the descriptor and is borrowed meanwhile.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    let mut range = kvm_pre_fault_memory {
        gpa,
        size,
        ..Default::default()
    };
    // SAFETY: the opcode takes this argument.
    let request = unsafe { Updater::<KVM_PRE_FAULT_MEMORY, _>::new(&mut range) };
    // SAFETY: as above, the descriptor is a vCPU's, and `range` outlives the call.
    unsafe { ioctl::ioctl(fd, request) }?;
    Ok(size - range.size)
}
