//! The log of requests.

use pagegate_core::events::Event;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::machine::PyVm;
use crate::names;

/// One request, from exit to resume.
#[pyclass(name = "Event", module = "pagegate", frozen, get_all)]
pub(crate) struct PyEvent {
    /// Position among all of the machine's events, from 0.
    sequence: u64,
    /// When it came: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``.
    time: u64,
    vcpu: u32,
    kind: &'static str,
    /// What was asked for: start in bytes.
    gpa: u64,
    /// What was asked for: bytes.
    size: u64,
    /// What was asked for: the state.
    to: &'static str,
    outcome: &'static str,
    /// What was converted: start in bytes.
    done_gpa: u64,
    /// What was converted: bytes; 0 for nothing.
    done_size: u64,
    /// What it was converted to.
    done_to: &'static str,
    /// Bytes whose state really changed.
    changed: u64,
    /// What the guest was told: 0, or a positive errno.
    errno: i32,
    /// Exit to resume in nanoseconds.
    latency: u64,
}

impl From<Event> for PyEvent {
    fn from(event: Event) -> Self {
        Self {
            sequence: event.sequence,
            time: event.time,
            vcpu: event.vcpu,
            kind: event.kind.as_str(),
            gpa: event.gpa,
            size: event.size,
            to: event.to.as_str(),
            outcome: event.outcome.as_str(),
            done_gpa: event.done_gpa,
            done_size: event.done_size,
            done_to: event.done_to.as_str(),
            changed: event.changed,
            errno: event.errno,
            latency: event.latency,
        }
    }
}

#[pymethods]
impl PyEvent {
    fn __repr__(&self) -> String {
        let Self {
            sequence,
            vcpu,
            kind,
            gpa,
            size,
            to,
            outcome,
            ..
        } = self;
        format!(
            "Event(sequence={sequence}, vcpu={vcpu}, kind={kind:?}, gpa={gpa:#x}, size={size:#x}, to={to:?}, \
             outcome={outcome:?})"
        )
    }
}

/// The machine's log of requests. It keeps the newest; iterating it gives them oldest first.
#[pyclass(name = "Events", module = "pagegate", frozen)]
pub(crate) struct PyEvents(pub(crate) Py<PyVm>);

impl PyEvents {
    fn kept(&self, py: Python<'_>, since: u64) -> PyResult<Vec<PyEvent>> {
        let machine = self.0.get().machine(py)?;
        let events = py.detach(|| machine.events().since(since));
        Ok(events.into_iter().map(PyEvent::from).collect())
    }
}

#[pymethods]
impl PyEvents {
    /// Events there were, kept or dropped.
    #[getter]
    fn total(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.0.get().machine(py)?.events().total())
    }

    /// Events that gave way to newer ones.
    #[getter]
    fn dropped(&self, py: Python<'_>) -> PyResult<u64> {
        let machine = self.0.get().machine(py)?;
        let events = machine.events();
        Ok(events.total().saturating_sub(events.kept() as u64))
    }

    /// The kept events with this sequence number or a higher one.
    fn since(&self, py: Python<'_>, #[pyo3(from_py_with = names::u64)] sequence: u64) -> PyResult<Vec<PyEvent>> {
        self.kept(py, sequence)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.0.get().machine(py)?.events().kept())
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.kept(py, 0)?.into_pyobject(py)?.call_method0("__iter__")
    }
}
