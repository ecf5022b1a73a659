//! userfaultfd(2): whoever touches a page that a mapping does not have yet sleeps until it has been put there: a thread of
//! this process, and KVM for a vCPU or for itself.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{
    UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_THREAD_ID, uffd_msg, uffdio_api,
    uffdio_copy, uffdio_range, uffdio_register, uffdio_zeropage,
};
use rustix::ioctl::{self, Opcode, Setter, Updater, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use super::mapping::{HostAddress, Mapping};
use crate::errno::Errno;

/// The ioctls' type.
const UFFDIO: u8 = 0xaa;
/// Of /dev/userfaultfd: returns a descriptor.
const USERFAULTFD_IOC_NEW: Opcode = opcode::none(UFFDIO, 0x00);
const UFFDIO_API: Opcode = opcode::read_write::<uffdio_api>(UFFDIO, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<uffdio_register>(UFFDIO, 0x00);
const UFFDIO_UNREGISTER: Opcode = opcode::read::<uffdio_range>(UFFDIO, 0x01);
const UFFDIO_WAKE: Opcode = opcode::read::<uffdio_range>(UFFDIO, 0x02);
const UFFDIO_COPY: Opcode = opcode::read_write::<uffdio_copy>(UFFDIO, 0x03);
const UFFDIO_ZEROPAGE: Opcode = opcode::read_write::<uffdio_zeropage>(UFFDIO, 0x04);
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

/// Where a message has the address, and the thread.
const ADDRESS: std::ops::Range<usize> = 16..24;
const THREAD: std::ops::Range<usize> = 24..28;

/// A descriptor that says which missing pages are touched, and puts them there.
pub(crate) struct Userfault(OwnedFd);

/// A thread sleeps because of a page that is not there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Touch {
    pub address: u64,
    /// As in /proc. KVM may have it done by a thread of the kernel.
    pub thread: libc::pid_t,
}

impl Userfault {
    /// # Errors
    /// EPERM where this process may not watch what the kernel touches, as KVM does; ENOSYS from a kernel without it.
    pub(crate) fn new() -> Result<Self, Errno> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: the descriptor can replace the bytes of what is registered with it, which only mappings of guest memory
        // are.
        let made = match unsafe { userfaultfd(flags) } {
            Err(rustix::io::Errno::PERM) => opened(flags)?,
            made => made?,
        };
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_THREAD_ID).into(),
            ioctls: 0,
        };
        // SAFETY: the opcode takes this argument.
        let request = unsafe { Updater::<UFFDIO_API, _>::new(&mut api) };
        // SAFETY: as above, and the descriptor is a userfaultfd.
        unsafe { ioctl::ioctl(&made, request) }?;
        Ok(Self(made))
    }

    /// From now on whoever touches a page of the mapping that its file does not have sleeps.
    ///
    /// # Errors
    /// EINVAL where the kernel cannot do that for this mapping.
    pub(crate) fn watch(&self, mapping: &Mapping) -> Result<(), Errno> {
        let mut register = uffdio_register {
            range: all(mapping),
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the opcode takes this argument.
        let request = unsafe { Updater::<UFFDIO_REGISTER, _>::new(&mut register) };
        // SAFETY: as above. That pages appear in the mapping without a write is as if the guest had written them.
        Ok(unsafe { ioctl::ioctl(&self.0, request) }?)
    }

    /// Nobody sleeps any more; what the file does not have reads as zeroes.
    ///
    /// # Errors
    /// ENOMEM.
    pub(crate) fn release(&self, mapping: &Mapping) -> Result<(), Errno> {
        // SAFETY: the opcode takes this argument, which the kernel only reads.
        let request = unsafe { Setter::<UFFDIO_UNREGISTER, _>::new(all(mapping)) };
        // SAFETY: as above.
        Ok(unsafe { ioctl::ioctl(&self.0, request) }?)
    }

    /// The next thread that sleeps, without waiting for one.
    pub(crate) fn next(&self) -> Option<Touch> {
        let mut message = [0; size_of::<uffd_msg>()];
        loop {
            let read = rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut message));
            if read != Ok(message.len()) {
                return None;
            }
            if u32::from(message[0]) == UFFD_EVENT_PAGEFAULT {
                return Some(Touch {
                    address: u64::from_ne_bytes(message[ADDRESS].try_into().ok()?),
                    thread: libc::pid_t::from_ne_bytes(message[THREAD].try_into().ok()?),
                });
            }
        }
    }

    /// Puts pages there, and wakes who sleeps because of them. Says how many bytes, also after a failure.
    ///
    /// # Errors
    /// EEXIST for one that is there already; ENOENT where this is not watched any more; EFAULT where there is nothing to copy;
    /// ENOMEM.
    pub(crate) fn copy(&self, to: HostAddress, from: *const u8, len: u64) -> (u64, Result<(), Errno>) {
        let mut done = 0;
        while done < len {
            let mut copy = uffdio_copy {
                dst: to.get() + done,
                src: from as u64 + done,
                len: len - done,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the opcode takes this argument, and the kernel checks where it copies from.
            let request = unsafe { Updater::<UFFDIO_COPY, _>::new(&mut copy) };
            // SAFETY: as above, and the kernel writes to what is registered only.
            let copied = unsafe { ioctl::ioctl(&self.0, request) };
            done += u64::try_from(copy.copy).unwrap_or(0);
            if let Err(errno) = again(copied) {
                return (done, Err(errno));
            }
        }
        (done, Ok(()))
    }

    /// The same with zeroes, all or some.
    ///
    /// # Errors
    /// As [`copy`](Self::copy).
    pub(crate) fn zero(&self, at: HostAddress, len: u64) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let mut zero = uffdio_zeropage {
                range: uffdio_range {
                    start: at.get() + done,
                    len: len - done,
                },
                mode: 0,
                zeropage: 0,
            };
            // SAFETY: the opcode takes this argument.
            let request = unsafe { Updater::<UFFDIO_ZEROPAGE, _>::new(&mut zero) };
            // SAFETY: as above, and the kernel writes to what is registered only.
            let zeroed = unsafe { ioctl::ioctl(&self.0, request) };
            done += u64::try_from(zero.zeropage).unwrap_or(0);
            again(zeroed)?;
        }
        Ok(())
    }

    /// Has who sleeps because of these pages touch them again.
    ///
    /// # Errors
    /// EINVAL for addresses that are not pages'.
    pub(crate) fn wake(&self, at: HostAddress, len: u64) -> Result<(), Errno> {
        let range = uffdio_range { start: at.get(), len };
        // SAFETY: the opcode takes this argument, which the kernel only reads.
        let request = unsafe { Setter::<UFFDIO_WAKE, _>::new(range) };
        // SAFETY: as above.
        Ok(unsafe { ioctl::ioctl(&self.0, request) }?)
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn all(mapping: &Mapping) -> uffdio_range {
    uffdio_range {
        start: mapping.address(0).get(),
        len: mapping.size(),
    }
}

/// EAGAIN: the process's mappings were changing, or only a part was done.
fn again(done: Result<(), rustix::io::Errno>) -> Result<(), Errno> {
    match done {
        Err(rustix::io::Errno::AGAIN) => Ok(()),
        done => Ok(done?),
    }
}

/// By /dev/userfaultfd (Linux 6.1), whose permissions say who may.
fn opened(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd");
    let device = device.map_err(|_| Errno(libc::EPERM))?;
    // SAFETY: the ioctl takes flags, and no memory.
    let made = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags.bits()) };
    match made < 0 {
        true => Err(Errno::last()),
        // SAFETY: the descriptor is new, so nobody else owns it.
        false => Ok(unsafe { OwnedFd::from_raw_fd(made) }),
    }
}
