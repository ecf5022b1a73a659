//! Latencies, counted while requests are answered: what [`Histogram::record`] does, in fewer instructions.

use std::fmt;

use hdrhistogram::Histogram;

/// Latencies above this are counted as this, in nanoseconds: a minute and more.
const LONGEST: u64 = (1 << 36) - 1;
/// The digits that are kept: a value is counted with those that have its highest 11 bits, 3 decimal digits.
const DIGITS: u32 = 10;

/// How often each latency was, in nanoseconds; as far as the longest one.
#[derive(Clone, Default)]
pub struct Latencies(Vec<u64>);

impl Latencies {
    #[inline]
    pub(crate) fn record(&mut self, nanoseconds: u64) {
        let index = index(nanoseconds.min(LONGEST));
        match self.0.get_mut(index) {
            Some(counter) => *counter += 1,
            None => self.record_longest(index),
        }
    }

    #[cold]
    fn record_longest(&mut self, index: usize) {
        // To the end of the values with as many bits.
        self.0.resize((index >> DIGITS << DIGITS) + (1 << DIGITS), 0);
        self.0[index] += 1;
    }

    pub(crate) fn add(&mut self, mut other: Self) {
        if self.0.len() < other.0.len() {
            std::mem::swap(self, &mut other);
        }
        for (counter, other) in self.0.iter_mut().zip(&other.0).filter(|(_, other)| **other > 0) {
            *counter += other;
        }
    }

    /// All of them, with three digits each.
    pub fn histogram(&self) -> Histogram<u64> {
        let longest = lowest(self.0.len()).max(2);
        #[expect(
            clippy::expect_used,
            reason = "the crate accepts whatever bounds are at least 1 and 2"
        )]
        let mut histogram = Histogram::new_with_bounds(1, longest, 3).expect("valid bounds");
        for (index, count) in self.0.iter().enumerate().filter(|(_, count)| **count > 0) {
            histogram.saturating_record_n(lowest(index).max(1), *count);
        }
        histogram
    }
}

impl fmt::Debug for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counted: u64 = self.0.iter().sum();
        f.debug_struct("Latencies")
            .field("counted", &counted)
            .finish_non_exhaustive()
    }
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
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn each_counter_has_the_values_from_its_lowest_to_the_next_ones() {
        let counters = index(LONGEST) + 1;
        for counter in 0..counters {
            assert_eq!(index(lowest(counter)), counter);
            if counter > 0 {
                assert_eq!(index(lowest(counter) - 1), counter - 1);
            }
        }
        assert_eq!(counters, 27 << DIGITS);
    }

    #[test]
    fn a_histogram_says_what_was_recorded() {
        let mut latencies = Latencies::default();
        let mut recorded = Histogram::<u64>::new_with_bounds(1, LONGEST, 3).unwrap();
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
        let mut sum = Latencies::default();
        sum.add(latencies);
        let histogram = sum.histogram();
        assert_eq!(histogram.len(), recorded.len());
        for quantile in [0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 0.999, 1.0] {
            assert_eq!(
                histogram.value_at_quantile(quantile),
                recorded.value_at_quantile(quantile)
            );
        }
    }
}
