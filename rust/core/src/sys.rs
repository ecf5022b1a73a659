//! System calls, each one function. Those of every request go to the kernel by rustix, without the C library's part.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use kvm_bindings::kvm_memory_attributes;
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, Setter, Updater, opcode};
use rustix::time::ClockId;

use crate::errno::Errno;

const KVMIO: u8 = 0xae;
const KVM_RUN: Opcode = opcode::none(KVMIO, 0x80);
const KVM_SET_MEMORY_ATTRIBUTES: Opcode = opcode::write::<kvm_memory_attributes>(KVMIO, 0xd2);
/// With a struct kvm_pre_fault_memory: gpa, size, flags, padding[5]; the kernel advances the first two.
const KVM_PRE_FAULT_MEMORY: Opcode = opcode::read_write::<[u64; 8]>(KVMIO, 0xd5);

/// memfd_create(2), close-on-exec.
pub(crate) fn memfd_create(name: &CStr) -> Result<OwnedFd, Errno> {
    Ok(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?)
}

/// Pages of a file that are in the page cache: cachestat(2).
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

/// clock_gettime(2): nanoseconds of CLOCK_MONOTONIC.
#[inline]
pub(crate) fn monotonic() -> u64 {
    let time = rustix::time::clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// RDTSC: ticks of the CPU's time-stamp counter.
#[inline]
pub(crate) fn ticks() -> u64 {
    // SAFETY: every CPU of the architecture has the instruction, which touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
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

/// lseek(2) with SEEK_DATA: where the next data at or after `from` is. Moves the file's position, which nobody uses.
#[inline]
pub(crate) fn next_data(file: impl AsFd, from: u64) -> Result<Option<u64>, Errno> {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(found) => Ok(Some(found)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The calling thread, for [`signal_thread`].
pub(crate) fn thread_id() -> libc::pid_t {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// tgkill(2) on a thread of this process. The caller makes sure that the thread still exists.
pub(crate) fn signal_thread(thread: libc::pid_t, signal: libc::c_int) {
    let process = std::process::id();
    // SAFETY: no memory is passed; a thread that is gone is ESRCH, which is what the caller wanted.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
}

/// fcntl(2): sets FD_CLOEXEC.
pub(crate) fn set_cloexec(fd: &OwnedFd) -> Result<(), Errno> {
    Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?)
}

/// KVM_RUN: no argument, but memory changes under the calling program.
struct Run;

// SAFETY: the opcode takes no argument, and what it writes, the run page, is declared by `IS_MUTATING`: without that the
// compiler may take what it knows of the page for what is there afterwards.
unsafe impl Ioctl for Run {
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

/// KVM_RUN, with its errno as it is. The caller holds the run page exclusively.
#[inline]
pub(crate) fn kvm_run(vcpu: &VcpuFd) -> Result<(), Errno> {
    // SAFETY: `vcpu` owns the descriptor and is borrowed meanwhile.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    // SAFETY: it is a vCPU's, for which this is the opcode.
    Ok(unsafe { ioctl::ioctl(fd, Run) }?)
}

/// KVM_SET_MEMORY_ATTRIBUTES.
#[inline]
pub(crate) fn kvm_set_memory_attributes(vm: &VmFd, attributes: kvm_memory_attributes) -> Result<(), Errno> {
    // SAFETY: `vm` owns the descriptor and is borrowed meanwhile.
    let fd = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
    // SAFETY: the opcode is the one of this argument, which the kernel only reads.
    let request = unsafe { Setter::<KVM_SET_MEMORY_ATTRIBUTES, _>::new(attributes) };
    // SAFETY: as above, and of a VM.
    Ok(unsafe { ioctl::ioctl(fd, request) }?)
}

/// KVM_PRE_FAULT_MEMORY once, which kvm-ioctls does not have: the bytes that were mapped.
pub(crate) fn kvm_pre_fault(vcpu: &VcpuFd, gpa: u64, size: u64) -> Result<u64, Errno> {
    // SAFETY: `vcpu` owns the descriptor and is borrowed meanwhile.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    let mut range = [gpa, size, 0, 0, 0, 0, 0, 0];
    // SAFETY: `range` has the layout and the size that the opcode says.
    let request = unsafe { Updater::<KVM_PRE_FAULT_MEMORY, _>::new(&mut range) };
    // SAFETY: as above; it outlives the call.
    unsafe { ioctl::ioctl(fd, request) }?;
    Ok(size - range[1])
}
