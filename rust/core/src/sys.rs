//! System calls that no crate in use wraps. Each is one function.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::errno::Errno;

/// memfd_create(2), close-on-exec.
pub(crate) fn memfd_create(name: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: `name` is a C string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(Errno::last());
    }
    // SAFETY: the kernel just made this descriptor and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
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
pub(crate) fn monotonic() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable and outlives the call, which cannot fail for this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// fallocate(2): frees a part of a file and keeps its size.
pub(crate) fn punch_hole(fd: RawFd, offset: u64, len: u64) -> Result<(), Errno> {
    let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        // Not by the C library's function, which is a point of cancellation and takes its time to become one.
        // SAFETY: no memory is passed.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fallocate,
                fd,
                flags,
                offset as libc::off_t,
                len as libc::off_t,
            )
        };
        match result {
            0 => return Ok(()),
            _ => match Errno::last() {
                Errno(libc::EINTR) => {}
                errno => return Err(errno),
            },
        }
    }
}

/// lseek(2) with SEEK_DATA: where the next data at or after `from` is. Moves the file's position, which nobody uses.
pub(crate) fn next_data(fd: RawFd, from: u64) -> Result<Option<u64>, Errno> {
    // SAFETY: no memory is passed.
    let found = unsafe { libc::lseek(fd, from as libc::off_t, libc::SEEK_DATA) };
    match (found, found < 0) {
        (found, false) => Ok(Some(found as u64)),
        (_, true) => match Errno::last() {
            Errno(libc::ENXIO) => Ok(None),
            errno => Err(errno),
        },
    }
}

/// The calling thread, for [`signal_thread`].
pub(crate) fn thread_id() -> libc::pid_t {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// tgkill(2) on a thread of this process. The caller makes sure that the thread still exists.
pub(crate) fn signal_thread(thread: libc::pid_t, signal: libc::c_int) {
    let process = std::process::id();
    // SAFETY: no memory is passed; a thread that is gone is ESRCH, which is what the caller wanted.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) };
}

/// fcntl(2): sets FD_CLOEXEC.
pub(crate) fn set_cloexec(fd: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: no memory is passed.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

/// KVM_RUN, with its errno as it is.
pub(crate) fn kvm_run(vcpu: RawFd) -> Result<(), Errno> {
    const KVM_RUN: libc::c_ulong = 0xae80;
    // SAFETY: the ioctl takes no pointer; it writes the run page, which the caller holds exclusively.
    match unsafe { libc::ioctl(vcpu, KVM_RUN, 0) } {
        r if r < 0 => Err(Errno::last()),
        _ => Ok(()),
    }
}

/// KVM_PRE_FAULT_MEMORY once, which kvm-ioctls does not have: the bytes that were mapped.
pub(crate) fn kvm_pre_fault(vcpu: RawFd, gpa: u64, size: u64) -> Result<u64, Errno> {
    const KVM_PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;
    // struct kvm_pre_fault_memory: gpa, size, flags, padding[5]; the kernel advances the first two.
    let mut range = [gpa, size, 0, 0, 0, 0, 0, 0];
    // SAFETY: `range` has the layout and the size that the number of the ioctl says, and outlives the call.
    match unsafe { libc::ioctl(vcpu, KVM_PRE_FAULT_MEMORY, range.as_mut_ptr()) } {
        r if r < 0 => Err(Errno::last()),
        _ => Ok(size - range[1]),
    }
}
