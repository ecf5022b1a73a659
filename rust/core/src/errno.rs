//! Error numbers, as the kernel returns them.

use std::fmt;
use std::io;

/// The errno of a malformed request, and of a refusal without a more specific one.
pub const EINVAL: i32 = libc::EINVAL;
/// In use.
pub const EBUSY: i32 = libc::EBUSY;
/// Waited for too long.
pub const ETIMEDOUT: i32 = libc::ETIMEDOUT;
/// Somebody has this address already.
pub const EADDRINUSE: i32 = libc::EADDRINUSE;
/// There is no such device.
pub const ENODEV: i32 = libc::ENODEV;
/// KVM_RUN's errno for KVM_EXIT_MEMORY_FAULT: a page in the wrong state.
pub const EFAULT: i32 = libc::EFAULT;
/// KVM_RUN's errno for an access to a poisoned page.
pub const EHWPOISON: i32 = libc::EHWPOISON;

/// A positive errno.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// The calling thread's errno, after a system call failed.
    pub fn last() -> Self {
        Errno::from(io::Error::last_os_error())
    }

    /// The symbol ("EFAULT") for the errnos that KVM and this core use, else "errno" and the number.
    pub fn name(self) -> String {
        let name = match self.0 {
            libc::EPERM => "EPERM",
            libc::ENOENT => "ENOENT",
            libc::EINTR => "EINTR",
            libc::EIO => "EIO",
            libc::E2BIG => "E2BIG",
            libc::EBADF => "EBADF",
            libc::EAGAIN => "EAGAIN",
            libc::ENOMEM => "ENOMEM",
            libc::EACCES => "EACCES",
            libc::EFAULT => "EFAULT",
            libc::EBUSY => "EBUSY",
            libc::EEXIST => "EEXIST",
            libc::ENODEV => "ENODEV",
            libc::EINVAL => "EINVAL",
            libc::EMFILE => "EMFILE",
            libc::ENOTTY => "ENOTTY",
            libc::ENOSPC => "ENOSPC",
            libc::ENOSYS => "ENOSYS",
            libc::EOPNOTSUPP => "EOPNOTSUPP",
            libc::EHWPOISON => "EHWPOISON",
            other => return format!("errno {other}"),
        };
        name.to_owned()
    }
}

impl From<rustix::io::Errno> for Errno {
    #[inline]
    fn from(errno: rustix::io::Errno) -> Self {
        Errno(errno.raw_os_error())
    }
}

impl std::error::Error for Errno {}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        Errno(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<kvm_ioctls::Error> for Errno {
    fn from(error: kvm_ioctls::Error) -> Self {
        Errno(error.errno())
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        io::Error::from_raw_os_error(errno.0)
    }
}
