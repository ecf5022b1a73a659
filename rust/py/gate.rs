//! The policy in place: changing it, and what it taught.

use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::decision::PyRegion;
use crate::machine::PyVm;

/// Who judges a machine's requests, and what a Python policy taught (``remember=``).
#[pyclass(name = "Gate", module = "pagegate", frozen)]
pub(crate) struct PyGate(pub(crate) Py<PyVm>);

#[pymethods]
impl PyGate {
    /// The policy, as it was given; ``None`` for the default.
    #[getter]
    fn current(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.0.get().given(py)
    }

    /// Puts another policy in place, also while the machine runs.
    ///
    /// Each request is judged by one of them: what comes after this has returned by the new one, what is being judged
    /// meanwhile by the old one. What the old one taught goes with it. Raises PolicyError for an object that is no
    /// policy; then the old one stays.
    fn replace(&self, py: Python<'_>, policy: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.get().replace(py, policy)
    }

    /// Forgets what was remembered about a region, or everything: the policy is asked again.
    #[pyo3(signature = (region = None))]
    fn forget(&self, py: Python<'_>, region: Option<&PyRegion>) {
        let hooks = self.0.get().hooks();
        if let Some(hooks) = hooks {
            py.detach(|| hooks.rules.forget(region.map(PyRegion::range)));
        }
    }

    /// Requests that the Python policy was asked about.
    #[getter]
    fn seen(&self) -> u64 {
        self.0.get().hooks().map_or(0, |hooks| hooks.rules.seen())
    }

    /// Requests that it was spared, because it had said ``remember=``.
    #[getter]
    fn spared(&self) -> u64 {
        self.0.get().hooks().map_or(0, |hooks| hooks.rules.spared())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.0)
    }
}
