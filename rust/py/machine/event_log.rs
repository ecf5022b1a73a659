//! The log of requests, for Python.

use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use pyo3::{PyTraverseError, PyVisit};

use super::parts::OfVm;
use crate::events::arrow;
use crate::events::event::PyEvent;
use crate::interpreter::arguments;

/// The machine's log of requests: the newest of each vCPU. Iterating gives the oldest first.
///
/// It is also an Arrow table, by ``__arrow_c_stream__``: ``polars.DataFrame(vm.events)``, ``pyarrow.table(vm.events)``,
/// ``pandas.DataFrame.from_arrow(vm.events)``. The columns are the log's own memory and are not copied. The rows of one
/// vCPU are in order; with several vCPUs, sort by ``sequence`` (order of completion) or ``time`` (order of the exits).
#[pyclass(name = "Events", module = "pagegate", frozen)]
pub(crate) struct PyEvents(pub(crate) OfVm);

impl PyEvents {
    fn kept(&self, py: Python<'_>, since: u64) -> PyResult<Vec<PyEvent>> {
        let machine = self.0.machine(py)?;
        let events = py.detach(|| machine.events().since(since));
        Ok(events.into_iter().map(PyEvent::from).collect())
    }
}

#[pymethods]
impl PyEvents {
    /// Number of events so far, kept or dropped.
    #[getter]
    fn total(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.0.machine(py)?.events().total())
    }

    /// Number of events that were dropped to make room for newer ones.
    #[getter]
    fn dropped(&self, py: Python<'_>) -> PyResult<u64> {
        let machine = self.0.machine(py)?;
        let events = machine.events();
        Ok(events.total().saturating_sub(events.kept() as u64))
    }

    /// The kept events with this sequence number or a higher one.
    fn since(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer)] sequence: u64,
    ) -> PyResult<Vec<PyEvent>> {
        self.kept(py, sequence)
    }

    #[pyo3(signature = (requested_schema = None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyCapsule>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let machine = self.0.machine(py)?;
        let (schema, batches) = py.detach(|| (self.0.parts.about.schema(), machine.events().batches()));
        arrow::stream(py, &schema, batches.into_iter(), requested_schema)
    }

    fn __arrow_c_schema__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        arrow::schema(py, &self.0.parts.about.schema())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.traverse(&visit)
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.0.machine(py)?.events().kept())
    }

    fn __iter__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        self.kept(py, 0)?.into_pyobject(py)?.call_method0("__iter__")
    }
}
