//! The log of requests, for Python.

use std::sync::Arc;

use pagegate_core::events::log::EventLog;
use pyo3::prelude::*;
use pyo3::types::{PyCFunction, PyCapsule};
use pyo3::{PyTraverseError, PyVisit};

use super::parts::OfVm;
use crate::events::arrow;
use crate::events::event::{self, PyEvent};
use crate::events::html;
use crate::interpreter::arguments;

/// The machine's log of requests: the newest of each vCPU. Iterating gives the oldest first.
///
/// It can be read after the machine is closed, too.
///
/// It is also an Arrow table, by ``__arrow_c_stream__``: ``polars.DataFrame(vm.events)``, ``pyarrow.table(vm.events)``,
/// ``pandas.DataFrame.from_arrow(vm.events)``. The columns are the log's own memory and are not copied. The rows of one
/// vCPU are in order, those of malformed requests for themselves: 4096 of these are kept beside the others, which they
/// cannot push out. Sort by ``sequence`` (order of completion) or ``time`` (order of the exits).
#[pyclass(name = "Events", module = "pagegate", frozen)]
pub(crate) struct PyEvents(pub(crate) OfVm);

impl PyEvents {
    fn log(&self, py: Python<'_>) -> PyResult<&Arc<EventLog>> {
        self.0.parts.events(py)
    }

    fn kept(&self, py: Python<'_>, since: u64) -> PyResult<Vec<PyEvent>> {
        let log = self.log(py)?;
        let events = py.detach(|| log.since(since));
        Ok(events.into_iter().map(PyEvent::from).collect())
    }
}

#[pymethods]
impl PyEvents {
    /// Number of events so far, kept or dropped.
    #[getter]
    fn total(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.log(py)?.total())
    }

    /// Number of events that were dropped to make room for newer ones.
    #[getter]
    fn dropped(&self, py: Python<'_>) -> PyResult<u64> {
        let log = self.log(py)?;
        Ok(log.total().saturating_sub(log.kept() as u64))
    }

    /// Whether the host could read and write private pages, as ``Vm(debug_private=True)`` allows.
    #[getter]
    fn debug_private(&self) -> bool {
        self.0.parts.about().debug_private()
    }

    /// The kept events with this sequence number or a higher one.
    fn since(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::sequence, _>)] sequence: u64,
    ) -> PyResult<Vec<PyEvent>> {
        self.kept(py, sequence)
    }

    #[pyo3(signature = (requested_schema = None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyCapsule>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let log = self.log(py)?;
        let (schema, batches) = py.detach(|| (self.0.parts.about().schema(), log.batches()));
        arrow::stream(py, &schema, batches.into_iter(), requested_schema)
    }

    fn __arrow_c_schema__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        arrow::schema(py, &self.0.parts.about().schema())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.traverse(&visit)
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.log(py)?.kept())
    }

    /// An event by its place among those that are kept, or a list of them for a slice.
    fn __getitem__<'py>(&self, py: Python<'py>, index: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let events = self.kept(py, 0)?;
        event::item(py, index, events.len(), |at| events.get(at).cloned())
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let log = self.log(py)?;
        let (total, kept) = (log.total(), log.kept() as u64);
        Ok(format!("<pagegate.Events: {kept} kept of {total}>"))
    }

    /// The events as they come, for asyncio: ``async for event in vm.events.follow()``.
    ///
    /// From the oldest that is kept on, or from sequence number ``since``, to the last of one run: the one that is in
    /// progress at the call, else the last one, else the first that there will be. If the machine is closed, there
    /// will be no more: then to the last that is kept. ``interval``: seconds between two looks at the log, 0.05 by
    /// default.
    #[pyo3(signature = (since = 0, *, interval = 0.05))]
    fn follow<'py>(
        slf: &Bound<'py, Self>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::since, _>)] since: u64,
        #[pyo3(from_py_with = arguments::real::<arguments::named::interval>)] interval: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let follow = py.import("pagegate.asynchronous")?.getattr("follow")?;
        let of_vm = &slf.get().0;
        let (run, log) = (of_vm.parts.watched(), of_vm.parts.events(py)?.clone());
        // Not the parts: they may hold what holds this.
        let parts = Arc::downgrade(&of_vm.parts);
        let end = PyCFunction::new_closure(py, None, None, move |_, _| {
            let closed = || parts.upgrade().is_none_or(|parts| parts.closed());
            let over = run.as_ref().and_then(|run| run.end());
            over.or_else(|| closed().then(|| log.total()))
        })?;
        follow.call1((of_vm.vm.clone_ref(py), end, since, interval))
    }

    fn _repr_html_(&self, py: Python<'_>) -> PyResult<String> {
        html::events(py, self.kept(py, 0)?)
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.kept(py, 0)?.into_pyobject(py)?.call_method0("__iter__")
    }
}
