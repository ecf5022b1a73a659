//! The report of a run.

use pagegate_core::machine::report::Report;
use pyo3::prelude::*;

/// Time from exit to resume of a run's requests, in nanoseconds, to three digits.
///
/// 0 if there were no requests.
#[pyclass(name = "Latency", module = "pagegate", frozen, get_all)]
#[derive(Clone)]
pub(crate) struct PyLatency {
    p50: u64,
    p90: u64,
    p99: u64,
    max: u64,
}

#[pymethods]
impl PyLatency {
    fn __repr__(&self) -> String {
        let Self { p50, p90, p99, max } = self;
        format!("Latency(p50={p50}, p90={p90}, p99={p99}, max={max})")
    }
}

/// What a run did, and why it ended.
#[pyclass(name = "Report", module = "pagegate", frozen, get_all)]
pub(crate) struct PyReport {
    /// Why it ended: "halt", "shutdown", "timeout", "stopped", "denied", "livelock", or a Stop's reason.
    reason: String,
    /// Requests that reached the policy: ``faults + hypercalls``.
    ///
    /// Poisoned pages are not among them.
    requests: u64,
    /// Requests that ended in a conversion, including those whose pages were in that state already.
    conversions: u64,
    /// Requests that the policy refused.
    denied: u64,
    /// Requests that the guest had to make again.
    retries: u64,
    /// Implicit requests that reached the policy.
    faults: u64,
    /// Explicit requests that reached the policy, by hypercall or doorbell.
    hypercalls: u64,
    /// Accesses to poisoned pages.
    poisons: u64,
    /// Explicit requests that were refused without asking the policy, and unknown hypercalls.
    malformed: u64,
    /// Spurious faults: another vCPU had converted the page meanwhile, so the guest was just resumed.
    stale: u64,
    /// Bytes that KVM mapped before the guest touched them, for ``Convert(prefault=True)``.
    bytes_prefaulted: u64,
    /// Bytes that became private; those that were already are not counted.
    bytes_to_private: u64,
    /// Bytes that became shared; those that were already are not counted.
    bytes_to_shared: u64,
    /// Time from exit to resume of its requests.
    latency: PyLatency,
    /// How long the run took.
    seconds: f64,
}

impl From<Report> for PyReport {
    fn from(report: Report) -> Self {
        let tally = report.tally;
        let latency = &tally.latency;
        Self {
            reason: report.reason,
            requests: tally.requests(),
            conversions: tally.conversions,
            denied: tally.denied,
            retries: tally.retries,
            faults: tally.faults,
            hypercalls: tally.hypercalls,
            poisons: tally.poisons,
            malformed: tally.malformed,
            stale: tally.stale,
            bytes_prefaulted: tally.bytes_prefaulted,
            bytes_to_private: tally.bytes_to_private,
            bytes_to_shared: tally.bytes_to_shared,
            latency: PyLatency {
                p50: latency.at(0.5),
                p90: latency.at(0.9),
                p99: latency.at(0.99),
                max: latency.max(),
            },
            seconds: report.duration.as_secs_f64(),
        }
    }
}

#[pymethods]
impl PyReport {
    fn __repr__(&self) -> String {
        let Self {
            reason,
            requests,
            conversions,
            denied,
            retries,
            seconds,
            ..
        } = self;
        format!(
            "Report(reason={reason:?}, requests={requests}, conversions={conversions}, denied={denied}, \
             retries={retries}, seconds={seconds:.6})"
        )
    }
}
