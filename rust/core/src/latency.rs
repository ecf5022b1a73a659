//! Latencies, counted while requests are answered: what [`Histogram::record`] does, in a fifth of its instructions.

use hdrhistogram::Histogram;

/// Latencies above this are counted as this, in nanoseconds: a minute and more.
const LONGEST: u64 = (1 << 36) - 1;
/// The digits that are kept: a value is counted with those that have its highest 11 bits, 3 decimal digits.
const DIGITS: u32 = 10;
const COUNTERS: usize = ((LONGEST.ilog2() - DIGITS + 2) << DIGITS) as usize;

/// How often each latency was, in nanoseconds.
pub(crate) struct Latencies(Box<[u64]>);

impl Default for Latencies {
    fn default() -> Self {
        Self(vec![0; COUNTERS].into_boxed_slice())
    }
}

impl Latencies {
    #[inline]
    pub(crate) fn record(&mut self, nanoseconds: u64) {
        if let Some(counter) = self.0.get_mut(index(nanoseconds.min(LONGEST))) {
            *counter += 1;
        }
    }

    /// All of them.
    pub(crate) fn histogram(&self) -> Histogram<u64> {
        let mut histogram = empty();
        for (index, count) in self.0.iter().enumerate().filter(|(_, count)| **count > 0) {
            histogram.saturating_record_n(lowest(index).max(1), *count);
        }
        histogram
    }
}

/// A histogram of latencies.
pub(crate) fn empty() -> Histogram<u64> {
    #[expect(clippy::expect_used, reason = "the bounds are constants that the crate accepts")]
    Histogram::new_with_bounds(1, LONGEST, 3).expect("valid bounds")
}

/// The counter of a value: how far it has to be shifted to have 11 bits, and those bits.
#[inline]
fn index(value: u64) -> usize {
    let shift = (value | ((2 << DIGITS) - 1)).ilog2() - DIGITS;
    ((u64::from(shift) << DIGITS) + (value >> shift)) as usize
}

/// The lowest value that has this counter.
fn lowest(index: usize) -> u64 {
    let shift = (index >> DIGITS).saturating_sub(1);
    ((index - (shift << DIGITS)) as u64) << shift
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_has_the_values_from_its_lowest_to_the_next_ones() {
        for counter in 0..COUNTERS {
            assert_eq!(index(lowest(counter)), counter);
            if counter > 0 {
                assert_eq!(index(lowest(counter) - 1), counter - 1);
            }
        }
        assert_eq!(index(LONGEST), COUNTERS - 1);
    }

    #[test]
    fn a_histogram_says_what_was_recorded() {
        let mut latencies = Latencies::default();
        let mut recorded = empty();
        let mut value = 1;
        while value <= LONGEST {
            for value in [value - 1, value, value + value / 3, value + value / 2] {
                latencies.record(value);
                recorded.saturating_record(value.clamp(1, LONGEST));
            }
            value = value * 5 / 4 + 1;
        }
        latencies.record(u64::MAX);
        recorded.saturating_record(LONGEST);
        let histogram = latencies.histogram();
        assert_eq!(histogram.len(), recorded.len());
        for quantile in [0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0] {
            assert_eq!(histogram.value_at_quantile(quantile), recorded.value_at_quantile(quantile));
        }
    }
}
