//! The states of pages, and how much memory is resident.

use pagegate_core::machine::assembly::Machine;
use pagegate_core::memory::address::{PAGE_SIZE, Range, Run, State};
use pyo3::exceptions::{PyIndexError, PyMemoryError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{PyTraverseError, PyVisit};

use super::parts::OfVm;
use crate::interpreter::{arguments, sizes};

/// The state of every page. This is the only copy: KVM has no ioctl to read attributes back.
#[pyclass(name = "Attributes", module = "pagegate", frozen)]
pub(crate) struct PyAttributes(pub(super) OfVm);

impl PyAttributes {
    /// The address in memory of `gpa`, which may have the view bit.
    fn page(&self, machine: &Machine, gpa: u64) -> PyResult<u64> {
        match machine.memory().views().locate(gpa) {
            Some(place) => Ok(place.gpa),
            None => Err(PyIndexError::new_err(format!(
                "gpa {gpa:#x} lies outside the guest's {:#x} bytes",
                self.0.parts.memory
            ))),
        }
    }
}

#[pymethods]
impl PyAttributes {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let machine = self.0.machine(py)?;
        let (private, memory) = (machine.memory().private_bytes(), self.0.parts.memory);
        let generation = machine.memory().generation();
        Ok(format!(
            "<pagegate.Attributes: {private:#x} bytes of {memory:#x} private, generation {generation}>"
        ))
    }

    fn _repr_html_(slf: &Bound<'_, Self>) -> PyResult<String> {
        let vm = slf.get().0.vm.bind(slf.py());
        slf.py()
            .import("pagegate.html")?
            .getattr("attributes")?
            .call1((vm,))?
            .extract()
    }

    /// Whether the page that holds ``gpa`` is private. IndexError outside memory.
    fn is_private(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
    ) -> PyResult<bool> {
        let machine = self.0.machine(py)?;
        let page = self.page(&machine, gpa)?;
        Ok(machine.memory().state(page) == State::Private)
    }

    /// Maximal runs of one state as ``(gpa, size, state)`` in bytes, ascending, by default of all memory.
    ///
    /// Raises as ``state`` does.
    #[pyo3(signature = (gpa = 0, size = None))]
    fn runs<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = sizes::optional::<arguments::named::size>)] size: Option<u64>,
    ) -> PyResult<Bound<'py, PyList>> {
        let machine = self.0.machine(py)?;
        let start = self.page(&machine, gpa)?;
        let views = machine.memory().views();
        let size = size.unwrap_or(views.memory_end() - start);
        let range = Range::new(start, size).filter(|range| range.end() <= views.memory_end());
        let range = range
            .ok_or_else(|| PyValueError::new_err(format!("{gpa:#x} + {size:#x} is no page-aligned part of memory")))?;
        let runs = py.detach(|| machine.memory().runs_in(range));
        let runs = runs.map_err(|_| PyMemoryError::new_err(()))?;
        let item = |run: Run| (run.range.gpa(), run.range.size(), run.state.as_str());
        let list = PyList::empty(py);
        runs.into_iter().map(item).try_for_each(|run| list.append(run))?;
        Ok(list)
    }

    /// The state of a range of whole pages, by default of the page at ``gpa``.
    ///
    /// ``gpa`` and ``size``: bytes, multiples of 4096. IndexError for a gpa outside memory, ValueError for what is no
    /// range of pages in memory.
    #[pyo3(signature = (gpa, size = None))]
    fn state(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = sizes::optional::<arguments::named::size>)] size: Option<u64>,
    ) -> PyResult<&'static str> {
        let machine = self.0.machine(py)?;
        let start = self.page(&machine, gpa)?;
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
    /// Bytes that are not there yet: nobody has touched their pages, and they come from a folder or a pager.
    pub(super) missing: u64,
}

#[pymethods]
impl PyMemoryUsage {
    fn __repr__(&self) -> String {
        let Self { shared, private, .. } = self;
        let exact = if self.exact { "True" } else { "False" };
        let missing = match self.missing {
            0 => String::new(),
            missing => format!(", missing={missing}"),
        };
        format!("MemoryUsage(shared={shared}, private={private}, exact={exact}{missing})")
    }
}
