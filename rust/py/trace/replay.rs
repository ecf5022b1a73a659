//! Putting the requests of a trace to other policies.

use std::sync::Arc;

use pagegate_core::error::Error;
use pagegate_core::policy::hooks::Policy;
use pagegate_core::trace::replay::{self as core, Judged, ReplayError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::recorded::{failed, read_trace};
use crate::events::event::PyEvent;
use crate::interpreter::{arguments, attach, errors};
use crate::policy::decision;
use crate::policy::hooks::forget_requests;
use crate::policy::judge::Judge;

/// What a policy decided on the requests of a trace, in counts.
#[pyclass(name = "Judged", module = "pagegate.trace", frozen, get_all, eq)]
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PyJudged {
    /// Decisions to convert.
    converted: u64,
    /// Decisions to refuse.
    denied: u64,
    /// Decisions to let the guest try again.
    retried: u64,
    /// Decisions to end the run.
    stopped: u64,
    /// Decisions to free a poisoned page.
    discarded: u64,
    /// Bytes that became private.
    bytes_to_private: u64,
    /// Bytes that became shared.
    bytes_to_shared: u64,
    /// The most bytes that were shared at a time.
    peak_shared: u64,
    /// Conversions of pages of which some had been converted before.
    ping_pongs: u64,
    /// Sequence number of the first request at which the run would have ended; ``None`` if at none.
    ends: Option<u64>,
    /// Decisions that are not the recorded ones.
    differences: u64,
}

impl From<Judged> for PyJudged {
    fn from(judged: Judged) -> Self {
        Self {
            converted: judged.converted,
            denied: judged.denied,
            retried: judged.retried,
            stopped: judged.stopped,
            discarded: judged.discarded,
            bytes_to_private: judged.bytes_to_private,
            bytes_to_shared: judged.bytes_to_shared,
            peak_shared: judged.peak_shared,
            ping_pongs: judged.ping_pongs,
            ends: judged.ends,
            differences: judged.differences,
        }
    }
}

#[pymethods]
impl PyJudged {
    fn __repr__(&self) -> String {
        let Self {
            converted,
            denied,
            retried,
            stopped,
            peak_shared,
            ping_pongs,
            differences,
            ..
        } = self;
        format!(
            "Judged(converted={converted}, denied={denied}, retried={retried}, stopped={stopped}, \
             peak_shared={peak_shared:#x}, ping_pongs={ping_pongs}, differences={differences})"
        )
    }
}

/// A request on which the policies and the recording do not agree.
#[pyclass(name = "Difference", module = "pagegate.trace", frozen, get_all)]
pub(crate) struct PyDifference {
    /// The request, with what was decided when it was recorded.
    event: Py<PyEvent>,
    /// What each policy decided, in the order of the policies.
    decisions: Py<PyTuple>,
}

#[pymethods]
impl PyDifference {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (event, decisions) = (self.event.bind(py).repr()?, self.decisions.bind(py).repr()?);
        Ok(format!("Difference({event}, {decisions})"))
    }
}

/// The result of a replay.
#[pyclass(name = "Replay", module = "pagegate.trace", frozen, get_all)]
pub(crate) struct PyReplay {
    /// Requests that were put to each policy.
    requests: u64,
    /// Requests that are not in the trace, by the gaps between the sequence numbers.
    missing: u64,
    /// What was decided and done when the trace was recorded.
    recorded: Py<PyJudged>,
    /// What each policy would have decided and done, in the order of the policies.
    policies: Py<PyTuple>,
    /// The first requests on which the policies and the recording do not agree.
    differences: Py<PyTuple>,
    /// Number of all such requests.
    different: u64,
}

#[pymethods]
impl PyReplay {
    fn __repr__(&self) -> String {
        let Self {
            requests, different, ..
        } = self;
        format!("Replay(requests={requests}, different={different})")
    }
}

/// Puts the requests of a trace to each policy, in the order in which the recorded one was asked.
///
/// No KVM is needed, and a chain of built-in policies never enters Python. ``trace`` is a Trace, or what ``read``
/// takes. ``policies`` are as for ``Vm``; each has page states of its own, and decisions with ``remember=`` are
/// remembered. ``keep``: how many differences are kept. The requests are always the recorded ones: what the guest would
/// have asked for after another decision is not known. Beside the trace it takes at most 64 MiB of memory and 2 KiB for
/// each request, and 8 MiB for each TiB of guest memory, for each policy and once more.
///
/// Raises what a hook raises, with notes; PolicyError; ValueError for what is no trace.
#[pyfunction]
#[pyo3(signature = (trace, *policies, keep = 1000))]
pub(crate) fn replay(
    py: Python<'_>,
    trace: &Bound<'_, PyAny>,
    policies: &Bound<'_, PyTuple>,
    #[pyo3(from_py_with = arguments::integer::<arguments::named::keep, _>)] keep: usize,
) -> PyResult<PyReplay> {
    let trace = read_trace(py, trace, None, None)?.0;
    let judges = policies
        .iter()
        .map(|policy| Judge::of(Some(&policy)))
        .collect::<PyResult<Vec<_>>>()?;
    let judging: Vec<Arc<dyn Policy>> = judges.iter().map(|judge| judge.policy.clone()).collect();
    let found = py.detach(|| core::replay(&trace, &judging, keep, &mut attach::check_signals));
    forget_requests(py);
    let found = found.map_err(|error| match error {
        ReplayError::Trace(error) => failed(py, error),
        ReplayError::Interrupted(failure) => errors::raise(py, Error::Interrupted(failure)),
        ReplayError::Policy {
            policy,
            sequence,
            site,
            failure,
        } => {
            let error = errors::raise(py, Error::Hook { site, failure });
            let which = match judging.len() {
                1 => String::new(),
                n => format!(", policy {} of {n}", policy + 1),
            };
            let _ = error
                .value(py)
                .call_method1("add_note", (format!("event {sequence} of the trace{which}"),));
            error
        }
    })?;
    let judged = |judged: Judged| Py::new(py, PyJudged::from(judged));
    let differences = found.differences.into_iter().map(|difference| {
        let decisions = difference.decisions.into_iter().map(|each| decision::write(py, each));
        let decisions = PyTuple::new(py, decisions.collect::<PyResult<Vec<_>>>()?)?;
        Py::new(
            py,
            PyDifference {
                event: Py::new(py, PyEvent::from(difference.event))?,
                decisions: decisions.unbind(),
            },
        )
    });
    let differences = differences.collect::<PyResult<Vec<_>>>()?;
    let policies = found.policies.into_iter().map(judged).collect::<PyResult<Vec<_>>>()?;
    Ok(PyReplay {
        requests: found.requests,
        missing: found.missing,
        recorded: judged(found.recorded)?,
        policies: PyTuple::new(py, policies)?.unbind(),
        differences: PyTuple::new(py, differences)?.unbind(),
        different: found.different,
    })
}
