//! Counts of what vCPUs did.

use hdrhistogram::Histogram;

/// Latencies above this, some 69 seconds, are counted as this.
const LONGEST: u64 = 1 << 36;

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
    /// Requests that are to be tried again.
    pub retries: u64,
    /// Explicit requests that were malformed: EINVAL without the policy.
    pub malformed: u64,
    /// Spurious faults: out of date when they arrived.
    pub stale: u64,
    /// Bytes that KVM mapped ahead of the guest.
    pub bytes_prefaulted: u64,
    /// Bytes that became private.
    pub bytes_to_private: u64,
    /// Bytes that became shared.
    pub bytes_to_shared: u64,
    /// Exit to resume of each request, in nanoseconds, three digits.
    pub latency: Histogram<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "constant bounds that the crate accepts")]
        let latency = Histogram::new_with_bounds(1, LONGEST, 3).expect("valid bounds");
        Self {
            faults: 0,
            hypercalls: 0,
            poisons: 0,
            conversions: 0,
            denied: 0,
            retries: 0,
            malformed: 0,
            stale: 0,
            bytes_prefaulted: 0,
            bytes_to_private: 0,
            bytes_to_shared: 0,
            latency,
        }
    }
}

impl Tally {
    /// Requests that reached the policy.
    pub fn requests(&self) -> u64 {
        self.faults + self.hypercalls
    }

    /// Adds another vCPU's.
    pub(crate) fn add(&mut self, other: &Tally) {
        self.faults += other.faults;
        self.hypercalls += other.hypercalls;
        self.poisons += other.poisons;
        self.conversions += other.conversions;
        self.denied += other.denied;
        self.retries += other.retries;
        self.malformed += other.malformed;
        self.stale += other.stale;
        self.bytes_prefaulted += other.bytes_prefaulted;
        self.bytes_to_private += other.bytes_to_private;
        self.bytes_to_shared += other.bytes_to_shared;
        // Both have the same bounds.
        let _ = self.latency.add(&other.latency);
    }
}
