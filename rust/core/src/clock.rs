//! Time as requests are stamped with it.

use crate::sys;

/// A moment of the host's monotonic clock, which all machines and the kernel's traces share.
///
/// One number, where the standard library keeps seconds and nanoseconds apart: requests read it twice each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment(u64);

impl Moment {
    #[inline]
    pub(crate) fn now() -> Self {
        Self(sys::monotonic())
    }

    /// Nanoseconds of CLOCK_MONOTONIC.
    pub(crate) fn nanoseconds(self) -> u64 {
        self.0
    }

    /// Nanoseconds since then.
    #[inline]
    pub(crate) fn elapsed(self) -> u64 {
        sys::monotonic().saturating_sub(self.0)
    }
}
