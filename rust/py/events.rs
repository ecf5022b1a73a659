//! The log of requests.

use pagegate_core::events::Event;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use pyo3::{PyTraverseError, PyVisit};

use crate::fields::Standing;
use crate::machine::PyVm;
use crate::{arrow, names};

/// One request, from exit to resume.
#[pyclass(name = "Event", module = "pagegate", frozen, get_all, eq)]
#[derive(PartialEq, Eq)]
pub(crate) struct PyEvent {
    /// Position in the log, from 0: in the order in which requests were over.
    sequence: u64,
    /// When it came: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``; the order of the questions.
    time: u64,
    vcpu: u32,
    kind: &'static str,
    /// What was asked for: start in bytes.
    gpa: u64,
    /// What was asked for: bytes.
    size: u64,
    /// What was asked for: the state.
    to: &'static str,
    /// The state that the pages were in.
    state: &'static str,
    /// Explicit: the guest's hint in bytes; else 0.
    page_size: u32,
    /// Explicit: RDX; else 0.
    raw: u32,
    /// Implicit: KVM_MEMORY_EXIT_FLAG_*; else 0.
    flags: u32,
    /// Implicit: the guest's instruction pointer; else 0.
    rip: u64,
    /// Implicit: how often this very fault came before, with no change in between; else 0.
    repeats: u32,
    /// What the policy decided; "none" if it failed.
    decision: &'static str,
    /// What was to be converted: start in bytes; 0 for all decisions but "convert".
    decision_gpa: u64,
    /// What was to be converted: bytes; 0 for all decisions but "convert".
    decision_size: u64,
    /// What it was to be converted to.
    decision_to: &'static str,
    /// The decision said ``prefault=True``.
    decision_prefault: bool,
    /// The decision did not say ``discard=False``.
    decision_discard: bool,
    /// The errno of a "deny"; else 0.
    decision_errno: i32,
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
        let answer = event.answer;
        Self {
            sequence: event.sequence,
            time: event.time,
            vcpu: event.vcpu,
            kind: event.kind.as_str(),
            gpa: event.gpa,
            size: event.size,
            to: event.to.as_str(),
            state: Standing::from(event.state).as_str(),
            page_size: event.page_size,
            raw: event.raw,
            flags: event.flags,
            rip: event.rip,
            repeats: event.repeats,
            decision: answer.verdict.as_str(),
            decision_gpa: answer.gpa,
            decision_size: answer.size,
            decision_to: answer.to.as_str(),
            decision_prefault: answer.prefault,
            decision_discard: answer.discard,
            decision_errno: answer.errno,
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
///
/// It is an Arrow table too, by ``__arrow_c_stream__``: ``polars.DataFrame(vm.events)``, ``pyarrow.table(vm.events)``,
/// ``pandas.DataFrame.from_arrow(vm.events)``. The columns lie in the log's own memory and are not copied. Those of one
/// vCPU are in order; with several, sort by ``sequence`` (order of completion) or ``time`` (order of the questions).
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

    #[pyo3(signature = (requested_schema = None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyCapsule>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let machine = self.0.get().machine(py)?;
        let (schema, batches) = py.detach(|| (self.0.get().about().schema(), machine.events().batches()));
        arrow::stream(py, &schema, batches.into_iter(), requested_schema)
    }

    fn __arrow_c_schema__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        arrow::schema(py, &self.0.get().about().schema())
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
