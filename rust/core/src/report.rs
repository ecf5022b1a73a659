//! What a run did.

use std::time::Duration;

use crate::latency::Latencies;

/// Counts of one run; each vCPU keeps its own and they are added up at the end.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Implicit requests that reached the policy.
    pub faults: u64,
    /// Explicit requests that reached the policy.
    pub hypercalls: u64,
    /// Poisoned pages that were met.
    pub poisons: u64,
    /// Requests that ended in a conversion.
    pub conversions: u64,
    /// Requests that the policy refused.
    pub denied: u64,
    /// Requests that are to be tried again.
    pub retries: u64,
    /// Explicit requests that were malformed: EINVAL without the policy.
    pub malformed: u64,
    /// Faults that were out of date when they arrived.
    pub stale: u64,
    /// Bytes that KVM mapped ahead of the guest.
    pub bytes_prefaulted: u64,
    /// Bytes that became private.
    pub bytes_to_private: u64,
    /// Bytes that became shared.
    pub bytes_to_shared: u64,
    /// Exit to resume of each request, in nanoseconds.
    pub latency: Latencies,
}

impl Tally {
    /// Requests that reached the policy.
    pub fn requests(&self) -> u64 {
        self.faults + self.hypercalls
    }

    pub(crate) fn add(&mut self, other: Tally) {
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
        self.latency.add(other.latency);
    }
}

/// What a run did, and why it ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// "halt", "shutdown", "timeout", "stopped", "denied", "livelock", or the policy's own.
    pub reason: String,
    /// The counts.
    pub tally: Tally,
    /// How long it took.
    pub duration: Duration,
}
