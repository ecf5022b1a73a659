//! Time as requests are stamped with it.

use std::sync::OnceLock;
use std::time::Duration;

use crate::sys;

/// A moment of the host's monotonic clock, which all machines and the kernel's traces share.
///
/// One number, where the standard library keeps seconds and nanoseconds apart: each request reads it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment(u64);

impl Moment {
    #[inline]
    pub(crate) fn now() -> Self {
        Self(sys::monotonic())
    }

    /// Nanoseconds of CLOCK_MONOTONIC.
    #[inline]
    pub(crate) fn nanoseconds(self) -> u64 {
        self.0
    }
}

/// Measures how long requests take. Where the kernel keeps time by the CPU's time-stamp counter, that is read itself, which
/// takes a fifth of what the clock does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stopwatch {
    /// Nanoseconds of a tick of the counter, times 2^32; 0 where the counter is none to go by.
    scale: u64,
}

/// A moment of the stopwatch's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(u64);

/// Where the kernel says by what it keeps time. It does so by the counter only while all CPUs agree about that.
const CLOCKSOURCE: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
/// How long the counter is compared with the clock: the ends are known to some tens of nanoseconds.
const COMPARED: Duration = Duration::from_millis(2);

impl Stopwatch {
    /// The one of this host. The first one of a process compares counter and clock.
    pub(crate) fn new() -> Self {
        static SCALE: OnceLock<u64> = OnceLock::new();
        Self {
            scale: *SCALE.get_or_init(scale),
        }
    }

    /// The moment that the clock has just shown.
    #[inline]
    pub(crate) fn mark(self, now: Moment) -> Mark {
        Mark(match self.scale {
            0 => now.0,
            _ => sys::ticks(),
        })
    }

    /// Nanoseconds since then.
    #[inline]
    pub(crate) fn elapsed(self, since: Mark) -> u64 {
        match self.scale {
            0 => sys::monotonic().saturating_sub(since.0),
            scale => {
                let ticks = sys::ticks().saturating_sub(since.0);
                ((u128::from(ticks) * u128::from(scale)) >> 32) as u64
            }
        }
    }
}

fn scale() -> u64 {
    let source = std::fs::read_to_string(CLOCKSOURCE);
    if !source.is_ok_and(|source| source.trim() == "tsc") {
        return 0;
    }
    let (first_ticks, first) = both();
    std::thread::sleep(COMPARED);
    let (last_ticks, last) = both();
    let ticks = u128::from(last_ticks.saturating_sub(first_ticks));
    let scale = (u128::from(last - first) << 32).checked_div(ticks);
    // A counter that stands still, or creeps, is none to go by.
    scale.and_then(|scale| u64::try_from(scale).ok()).unwrap_or(0)
}

/// Counter and clock at one moment: the closest of some attempts.
fn both() -> (u64, u64) {
    let attempt = |_| {
        let before = sys::ticks();
        let now = sys::monotonic();
        let taken = sys::ticks().saturating_sub(before);
        (taken, before + taken / 2, now)
    };
    let (_, ticks, now) = (0..8).map(attempt).min().unwrap_or_default();
    (ticks, now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopwatch_goes_by_the_clock() {
        for watch in [Stopwatch::new(), Stopwatch { scale: 0 }] {
            let begun = Moment::now();
            let mark = watch.mark(begun);
            std::thread::sleep(Duration::from_millis(20));
            let (elapsed, after) = (watch.elapsed(mark), Moment::now());
            let by_clock = after.nanoseconds() - begun.nanoseconds();
            assert!(elapsed <= by_clock + by_clock / 1000, "{elapsed} of {by_clock}");
            // Somebody else may have had the CPU between the last two looks.
            assert!(elapsed >= 19_900_000, "{elapsed}");
        }
    }
}
