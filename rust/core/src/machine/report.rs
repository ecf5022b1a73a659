//! The report of a run.

use std::time::Duration;

use crate::policy::device_access::DeviceAccess;
use crate::vcpu::asker::Whereabouts;
use crate::vcpu::tally::Tally;

/// What a run did, and why it ended.
#[derive(Clone, Debug)]
pub struct Report {
    /// "halt", "shutdown", "reboot", "poweroff", "timeout", "stopped", "denied", "livelock", or the reason of a policy's Stop;
    /// of a run that failed "livelock", "interrupted" or "failed".
    pub reason: String,
    /// Where the vCPU was that ended it, if one did: by a triple fault, or a request after which it could not go on.
    pub at: Option<Whereabouts>,
    /// Whether the host may have read or written private pages.
    pub debug_private: bool,
    /// Accesses of devices to what is not shared.
    pub device_accesses: u64,
    /// The first of them.
    pub device_access: Option<DeviceAccess>,
    /// Malformed requests that the log dropped meanwhile.
    pub malformed_dropped: u64,
    /// Exits, requests and conversions, counted.
    pub tally: Tally,
    /// From the call to its return.
    pub duration: Duration,
}
