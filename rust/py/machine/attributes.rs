//! The states of pages, and how much memory is resident.

use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use super::parts::OfVm;
use crate::interpreter::arguments;

/// The state of every page. This is the only copy: KVM has no ioctl to read attributes back.
#[pyclass(name = "Attributes", module = "pagegate", frozen)]
pub(crate) struct PyAttributes(pub(super) OfVm);

impl PyAttributes {
    fn page(&self, gpa: u64) -> PyResult<u64> {
        let memory = self.0.parts.memory;
        let mask = self.0.parts.shared_bit.map_or(0, |bit| 1 << bit);
        let gpa = gpa & !mask;
        match gpa < memory {
            true => Ok(gpa),
            false => Err(PyIndexError::new_err(format!(
                "gpa {gpa:#x} lies outside the guest's {memory:#x} bytes"
            ))),
        }
    }
}

#[pymethods]
impl PyAttributes {
    /// Whether the page that holds ``gpa`` is private. IndexError outside memory.
    fn is_private(&self, py: Python<'_>, #[pyo3(from_py_with = arguments::integer)] gpa: u64) -> PyResult<bool> {
        let page = self.page(gpa)?;
        let machine = self.0.machine(py)?;
        Ok(machine.memory().state(page) == State::Private)
    }

    /// Maximal runs of one state as ``(gpa, size, state)`` in bytes, ascending, by default of all memory.
    ///
    /// Raises as ``state`` does.
    #[pyo3(signature = (gpa = 0, size = None))]
    fn runs(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer)] gpa: u64,
        #[pyo3(from_py_with = arguments::optional)] size: Option<u64>,
    ) -> PyResult<Vec<(u64, u64, &'static str)>> {
        let start = self.page(gpa)?;
        let size = size.unwrap_or(self.0.parts.memory - start);
        let range = Range::new(start, size).filter(|range| range.end() <= self.0.parts.memory);
        let range = range
            .ok_or_else(|| PyValueError::new_err(format!("{gpa:#x} + {size:#x} is no page-aligned part of memory")))?;
        let machine = self.0.machine(py)?;
        // From a snapshot, so that no vCPU waits while a long list is made.
        let snapshot = machine.memory().snapshot();
        let runs = snapshot.runs_in(range);
        Ok(runs
            .map(|run| (run.range.gpa(), run.range.size(), run.state.as_str()))
            .collect())
    }

    /// The state of a range of whole pages, by default of the page at ``gpa``.
    ///
    /// ``gpa`` and ``size``: bytes, multiples of 4096. IndexError for a gpa outside memory, ValueError for what is no
    /// range of pages in memory.
    #[pyo3(signature = (gpa, size = None))]
    fn state(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer)] gpa: u64,
        #[pyo3(from_py_with = arguments::optional)] size: Option<u64>,
    ) -> PyResult<&'static str> {
        let start = self.page(gpa)?;
        let machine = self.0.machine(py)?;
        let size = size.unwrap_or(PAGE_SIZE);
        let range =
            machine.memory().views().range(start, size).ok_or_else(|| {
                PyValueError::new_err(format!("{gpa:#x} + {size:#x} is no page-aligned part of memory"))
            })?;
        Ok(machine.memory().describe(range))
    }

    /// Bytes that are private.
    #[getter]
    fn private_bytes(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.0.machine(py)?.memory().private_bytes())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.traverse(&visit)
    }

    /// How many conversions changed the state of at least one page. One that was undone does not count.
    #[getter]
    fn generation(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(self.0.machine(py)?.memory().generation())
    }
}

/// Resident bytes of guest memory.
#[pyclass(name = "MemoryUsage", module = "pagegate", frozen, get_all)]
pub(crate) struct PyMemoryUsage {
    /// Resident bytes of the shared side.
    pub(super) shared: u64,
    /// Resident bytes of the private side; see ``exact``.
    pub(super) private: u64,
    /// Whether ``private`` was counted, by cachestat(2): Linux 6.5 and later, left out of some small kernels.
    ///
    /// If not, it is an upper bound: the bytes in state private.
    pub(super) exact: bool,
}

#[pymethods]
impl PyMemoryUsage {
    fn __repr__(&self) -> String {
        let Self { shared, private, .. } = self;
        let exact = if self.exact { "True" } else { "False" };
        format!("MemoryUsage(shared={shared}, private={private}, exact={exact})")
    }
}
