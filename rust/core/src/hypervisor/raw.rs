//! System calls that no crate makes in the way that this core needs, a function each.
//!
//! Those that every request makes go through rustix and not the C library, which saves some 130 instructions a request.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use kvm_bindings::{KVMIO, kvm_memory_attributes, kvm_pre_fault_memory};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode, Setter, Updater, opcode};
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

use super::mapping::Mapping;
use crate::errno::Errno;

const KVM_RUN: Opcode = opcode::none(KVMIO as u8, 0x80);
const KVM_SET_MEMORY_ATTRIBUTES: Opcode = opcode::write::<kvm_memory_attributes>(KVMIO as u8, 0xd2);
/// The kernel advances `gpa` and `size`.
const KVM_PRE_FAULT_MEMORY: Opcode = opcode::read_write::<kvm_pre_fault_memory>(KVMIO as u8, 0xd5);

/// The kernel completes the name.
const TUNSETIFF: Opcode = opcode::write::<libc::c_int>(b'T', 202);
const TUNGETIFF: Opcode = opcode::read::<libc::c_uint>(b'T', 210);

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

/// preadv(2): reads a file from offset `at` on into guest memory. Returns how many bytes there were.
pub(crate) fn read_vectored(file: &File, at: u64, into: &[VolatileSlice<'_>]) -> Result<usize, Errno> {
    let guards: Vec<_> = into.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<_> = guards.iter().map(|guard| vector(guard.as_ptr(), guard.len())).collect();
    let at = libc::off_t::try_from(at).map_err(|_| Errno(libc::EINVAL))?;
    // SAFETY: the addresses are those of the slices, which stay mapped while they are borrowed, and are accessed by nobody
    // through a reference.
    let done = unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int, at) };
    usize::try_from(done).map_err(|_| Errno::last())
}

/// pwritev(2): writes guest memory to a file from offset `at` on. Returns how many bytes were written.
pub(crate) fn write_vectored(file: &File, at: u64, from: &[VolatileSlice<'_>]) -> Result<usize, Errno> {
    let guards: Vec<_> = from.iter().map(VolatileSlice::ptr_guard).collect();
    let vectors: Vec<_> = guards
        .iter()
        .map(|guard| vector(guard.as_ptr().cast_mut(), guard.len()))
        .collect();
    let at = libc::off_t::try_from(at).map_err(|_| Errno(libc::EINVAL))?;
    // SAFETY: as above; the kernel only reads them.
    let done = unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int, at) };
    usize::try_from(done).map_err(|_| Errno::last())
}

fn vector(address: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: address.cast(),
        iov_len: len,
    }
}

/// mmap(2) with MAP_FIXED: maps `len` bytes of `file` from `offset` on over the same part of a mapping.
pub(crate) fn map_over(mapping: &Mapping, offset: u64, len: u64, file: &File) -> Result<(), Errno> {
    let (Ok(size), Ok(at)) = (usize::try_from(len), libc::off_t::try_from(offset)) else {
        return Err(Errno(libc::EINVAL));
    };
    // Checks that the part lies in the mapping.
    mapping.slice(offset, size)?;
    let address = mapping.address(offset).get() as *mut c_void;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the addresses belong to `mapping`, which this process accesses through volatile copies only, so that other
    // bytes may appear there; they stay mapped, as readable and writable as before.
    let mapped = unsafe { libc::mmap(address, size, prot, flags, file.as_raw_fd(), at) };
    match mapped == libc::MAP_FAILED {
        true => Err(Errno::last()),
        false => Ok(()),
    }
}

/// madvise(2) with MADV_POPULATE_READ (Linux 5.14): has the kernel read a part of a mapping's file, as if it were touched.
///
/// # Errors
/// EFAULT where that would be SIGBUS: the file was cut off, or cannot be read. EINVAL from an older kernel.
pub(crate) fn populate(mapping: &Mapping, offset: u64, len: usize) -> Result<(), Errno> {
    // Checks that the part lies in the mapping.
    mapping.slice(offset, len)?;
    let address = mapping.address(offset).get() as *mut c_void;
    // SAFETY: the addresses belong to `mapping`, and none of their bytes changes.
    match unsafe { libc::madvise(address, len, libc::MADV_POPULATE_READ) } {
        0 => Ok(()),
        _ => Err(Errno::last()),
    }
}

/// The calling thread's id, for [`signal_thread`].
pub(crate) fn thread_id() -> libc::pid_t {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// tgkill(2) of a thread of this process. The caller makes sure that the thread still exists. Returns whether it was sent: a
/// real-time signal is not where those that wait are too many (RLIMIT_SIGPENDING).
pub(crate) fn signal_thread(thread: libc::pid_t, signal: libc::c_int) -> bool {
    let process = std::process::id();
    // SAFETY: no memory is passed. For a thread that has ended the call fails with ESRCH and does nothing.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) == 0 }
}

/// What the process does when a signal comes.
pub(crate) struct Disposition(libc::sigaction);

impl Disposition {
    /// What it does at present.
    pub(crate) fn of(signal: libc::c_int) -> Result<Self, Errno> {
        let mut present = MaybeUninit::uninit();
        // SAFETY: the call sets nothing, and writes to `present`, which outlives it.
        let result = unsafe { libc::sigaction(signal, ptr::null(), present.as_mut_ptr()) };
        match result {
            // SAFETY: the call has succeeded, so it has been written.
            0 => Ok(Self(unsafe { present.assume_init() })),
            _ => Err(Errno::last()),
        }
    }

    /// To call this function, on the stack of the thread, and to end system calls with EINTR.
    pub(crate) fn calling(handler: extern "C" fn(libc::c_int)) -> Self {
        // SAFETY: all zeroes is one: the default action, no flags, no signals blocked.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as usize;
        Self(action)
    }

    /// Whether it calls this function.
    pub(crate) fn calls(&self, handler: extern "C" fn(libc::c_int)) -> bool {
        self.0.sa_sigaction == handler as usize
    }

    /// Whether it calls no function: the signal ends the process, or is ignored.
    pub(crate) fn calls_nothing(&self) -> bool {
        [libc::SIG_DFL, libc::SIG_IGN].contains(&self.0.sa_sigaction)
    }

    /// Sets it. A handler must be one that may run at any time, whatever the thread is doing.
    pub(crate) fn set(&self, signal: libc::c_int) -> Result<(), Errno> {
        // SAFETY: the structure outlives the call, and is one of this type's own: what the process had before, or a handler
        // that the caller vouches for.
        match unsafe { libc::sigaction(signal, &self.0, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(Errno::last()),
        }
    }
}

/// fcntl(2): sets FD_CLOEXEC.
pub(crate) fn set_cloexec(fd: &OwnedFd) -> Result<(), Errno> {
    Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?)
}

/// fcntl(2) with F_DUPFD_CLOEXEC: a further descriptor of an open file. EBADF if the number is none's.
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: no memory is passed, and another descriptor of the same file changes nothing for whoever owns the first.
    let made = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if made < 0 {
        return Err(Errno::last());
    }
    // SAFETY: the descriptor is new, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(made) })
}

/// An eventfd's descriptor.
pub(crate) fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` keeps it open for at least as long.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// TUNSETIFF: makes `tun`, a new opening of /dev/net/tun, a queue of the tap of this name, which is made if there is none.
/// Frames come and go as they are, without a header. Of the name the first 16 bytes count.
pub(crate) fn attach_tap(tun: &File, name: &[u8]) -> Result<(), Errno> {
    let mut request = interface_request(name, libc::IFF_TAP | libc::IFF_NO_PI);
    // SAFETY: the opcode takes this argument, which the kernel reads and writes.
    let request = unsafe { Updater::<TUNSETIFF, _>::new(&mut request) };
    // SAFETY: as above. For a file that is no opening of /dev/net/tun the opcode is another device's, but `tun` is one.
    Ok(unsafe { ioctl::ioctl(tun, request) }?)
}

/// TUNGETIFF: the IFF_* flags of the tun or tap that a character device's descriptor is a queue of.
pub(crate) fn tap_flags(tap: BorrowedFd<'_>) -> Result<libc::c_int, Errno> {
    let mut request = interface_request(&[], 0);
    // SAFETY: the opcode takes this argument, which the kernel writes.
    let update = unsafe { Updater::<TUNGETIFF, _>::new(&mut request) };
    // SAFETY: as above. As another device's, the opcode says that an int is written, for which there is room.
    unsafe { ioctl::ioctl(tap, update) }?;
    // SAFETY: any bytes are a number.
    Ok(unsafe { request.ifr_ifru.ifru_flags }.into())
}

fn interface_request(name: &[u8], flags: libc::c_int) -> libc::ifreq {
    let mut name_field = [0; libc::IFNAMSIZ];
    for (to, from) in name_field.iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    libc::ifreq {
        ifr_name: name_field,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: flags as libc::c_short,
        },
    }
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
