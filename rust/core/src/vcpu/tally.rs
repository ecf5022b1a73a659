//! Counts of what vCPUs did.

use histogram::Histogram;

use crate::allocation::reserve;
use crate::error::Error;

/// The histogram's resolution is one part in 1,024: three decimal digits.
const GROUPING_POWER: u8 = 10;
/// Latencies of 2^36 ns (69 seconds) or more are counted as 2^36 - 1.
const MAX_VALUE_POWER: u8 = 36;
/// How many buckets that takes: 216 KiB.
const BUCKETS: usize = (MAX_VALUE_POWER - GROUPING_POWER + 1) as usize * (1 << GROUPING_POWER);

/// How long requests took, exit to resume, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram);

impl Latencies {
    fn new() -> Result<Self, Error> {
        let mut buckets = Vec::new();
        reserve(&mut buckets, BUCKETS).map_err(|errno| Error::Host {
            what: "count how long requests take",
            errno,
        })?;
        buckets.resize(BUCKETS, 0);
        #[expect(clippy::expect_used, reason = "constant parameters that the crate accepts")]
        let histogram = Histogram::from_buckets(GROUPING_POWER, MAX_VALUE_POWER, buckets).expect("valid parameters");
        Ok(Self(histogram))
    }

    #[inline]
    pub(crate) fn record(&mut self, nanoseconds: u64) {
        // Cannot fail: the value is in range.
        let _ = self.0.increment(nanoseconds.min((1 << MAX_VALUE_POWER) - 1));
    }

    /// How many requests were counted.
    pub fn len(&self) -> u64 {
        self.0.as_slice().iter().sum()
    }

    /// Whether there were none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The longest, to three digits.
    pub fn max(&self) -> u64 {
        self.at(1.0)
    }

    /// A quantile of the latencies, `part` in 0..=1, to three digits; 0 if there were no requests.
    pub fn at(&self, part: f64) -> u64 {
        let bucket = self.0.quantile_bucket(part);
        bucket.ok().flatten().map_or(0, |bucket| bucket.end())
    }
}

/// Counts of one run; each vCPU keeps its own and they are added up at the end.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Implicit requests that reached the policy.
    pub faults: u64,
    /// Explicit requests that reached the policy.
    pub hypercalls: u64,
    /// Accesses to poisoned pages.
    pub poisons: u64,
    /// Requests that ended in a conversion.
    pub conversions: u64,
    /// Requests that the policy refused.
    pub denied: u64,
    /// Requests that were not carried out, or only in part, and are made again.
    pub retries: u64,
    /// Hypercalls that were answered with an errno without asking the policy: malformed requests and unknown
    /// hypercalls.
    pub malformed: u64,
    /// Spurious faults, and requests that were superseded.
    pub stale: u64,
    /// How often pages were opened to a vCPU without paging.
    pub opened: u64,
    /// Bytes that KVM_PRE_FAULT_MEMORY mapped.
    pub bytes_prefaulted: u64,
    /// Bytes that became private.
    pub bytes_to_private: u64,
    /// Bytes that became shared.
    pub bytes_to_shared: u64,
    /// How long each request took.
    pub latency: Latencies,
}

impl Tally {
    /// Counts of nothing.
    ///
    /// # Errors
    /// `Host` if there is no memory for them.
    pub(crate) fn new() -> Result<Self, Error> {
        Ok(Self {
            faults: 0,
            hypercalls: 0,
            poisons: 0,
            conversions: 0,
            denied: 0,
            retries: 0,
            malformed: 0,
            stale: 0,
            opened: 0,
            bytes_prefaulted: 0,
            bytes_to_private: 0,
            bytes_to_shared: 0,
            latency: Latencies::new()?,
        })
    }

    /// Requests that reached the policy.
    pub fn requests(&self) -> u64 {
        self.faults + self.hypercalls
    }

    /// Adds another vCPU's counts.
    pub(crate) fn add(&mut self, other: &Tally) {
        self.faults += other.faults;
        self.hypercalls += other.hypercalls;
        self.poisons += other.poisons;
        self.conversions += other.conversions;
        self.denied += other.denied;
        self.retries += other.retries;
        self.malformed += other.malformed;
        self.stale += other.stale;
        self.opened += other.opened;
        self.bytes_prefaulted += other.bytes_prefaulted;
        self.bytes_to_private += other.bytes_to_private;
        self.bytes_to_shared += other.bytes_to_shared;
        // Both have the same parameters, and counts of requests do not overflow.
        let _ = self.latency.0.checked_add_assign(&other.latency.0);
    }
}
