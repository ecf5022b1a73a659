//! What a run did.

use pagegate_core::machine::report::Report;
use pyo3::prelude::*;

/// Exit to resume of the requests of a run, in nanoseconds, to three digits; 0 where there were none.
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
    /// One of "halt", "shutdown", "timeout", "stopped", "denied", "livelock", or a Stop's own.
    reason: String,
    /// Requests that reached the policy: ``faults + hypercalls``.
    requests: u64,
    /// Requests that ended in a conversion, also where nothing had to change.
    conversions: u64,
    denied: u64,
    retries: u64,
    /// Implicit requests.
    faults: u64,
    /// Explicit requests, by hypercall or doorbell.
    hypercalls: u64,
    /// Accesses to poisoned memory.
    poisons: u64,
    /// Explicit requests that were refused before any policy saw them.
    malformed: u64,
    /// Faults that another vCPU's conversion had overtaken: the guest just looked again.
    stale: u64,
    /// Bytes that KVM mapped ahead of the guest, for ``Convert(prefault=True)``.
    bytes_prefaulted: u64,
    /// Bytes whose state really changed.
    bytes_to_private: u64,
    /// Bytes whose state really changed.
    bytes_to_shared: u64,
    latency: PyLatency,
    seconds: f64,
}

impl From<Report> for PyReport {
    fn from(report: Report) -> Self {
        let tally = report.tally;
        let latency = &tally.latency;
        let at = |quantile| match latency.is_empty() {
            true => 0,
            false => latency.value_at_quantile(quantile),
        };
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
                p50: at(0.5),
                p90: at(0.9),
                p99: at(0.99),
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
