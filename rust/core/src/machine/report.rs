//! The report of a run.

use std::time::Duration;

use crate::vcpu::tally::Tally;

/// What a run did, and why it ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// "halt", "shutdown", "timeout", "stopped", "denied", "livelock", or the reason of a policy's Stop.
    pub reason: String,
    /// Exits, requests and conversions, counted.
    pub tally: Tally,
    /// From the call to its return.
    pub duration: Duration,
}
