//! Time as requests are stamped with it.

use std::time::Duration;

use crate::sys;

/// A moment of the host's monotonic clock, which all machines and the kernel's traces share.
///
/// One number, where the standard library keeps seconds and nanoseconds apart: requests read it twice each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment(u64);

impl Moment {
    pub(crate) fn now() -> Self {
        Self(sys::monotonic())
    }

    /// Nanoseconds of CLOCK_MONOTONIC.
    pub(crate) fn nanoseconds(self) -> u64 {
        self.0
    }

    pub(crate) fn elapsed(self) -> Duration {
        Duration::from_nanos(sys::monotonic().saturating_sub(self.0))
    }
}
