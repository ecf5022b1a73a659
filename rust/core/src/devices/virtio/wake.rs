//! What wakes a device's own thread: a source that is readable from a ring on until it is cleared.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use crate::error::Error;

/// An eventfd.
#[derive(Debug)]
pub(super) struct Wake(OwnedFd);

impl Wake {
    /// # Errors
    /// Those of eventfd(2).
    pub(super) fn new() -> Result<Self, Error> {
        let made = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let what = "create a device's eventfd";
        let made = made.map_err(|errno| Error::Host {
            what,
            errno: errno.into(),
        });
        Ok(Self(made?))
    }

    pub(super) fn ring(&self) {
        // It fails only if the counter is full, and then it is readable already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    pub(super) fn clear(&self) {
        // It fails only if it was not rung.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
