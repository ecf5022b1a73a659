//! What a run did.

use std::time::Duration;

use crate::vcpu::tally::Tally;

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
