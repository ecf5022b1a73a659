//! Work that may take long, in pieces: the watch is called in between.

use crate::allocation::reserve;
use crate::errno::Errno;
use crate::error::Error;
use crate::input::Watch;

/// Units of work, each a byte or a few comparisons, between two calls of the watch: less than a millisecond.
const PART: usize = 1 << 19;
/// Bytes that are searched or copied between two calls of the watch.
pub(super) const BYTES: usize = 1 << 20;

pub(super) struct Pace<'a, 'w> {
    watch: &'a mut Watch<'w>,
    left: usize,
}

impl<'a, 'w> Pace<'a, 'w> {
    pub(super) fn new(watch: &'a mut Watch<'w>) -> Self {
        Self { watch, left: 0 }
    }

    /// Some work was done.
    pub(super) fn spend(&mut self, units: usize) -> Result<(), Error> {
        match self.left.checked_sub(units) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => self.look(),
        }
    }

    /// Calls the watch.
    pub(super) fn look(&mut self) -> Result<(), Error> {
        self.left = PART;
        (self.watch)().map_err(Error::Interrupted)
    }

    /// A copy of `bytes`.
    pub(super) fn copy(&mut self, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let mut copy = Vec::new();
        reserve(&mut copy, bytes.len()).map_err(no_memory)?;
        for part in bytes.chunks(BYTES) {
            self.look()?;
            copy.extend_from_slice(part);
        }
        Ok(copy)
    }
}

pub(super) fn no_memory(errno: Errno) -> Error {
    Error::Host {
        what: "read the kernel",
        errno,
    }
}
