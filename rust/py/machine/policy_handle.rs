//! The policy in place: replacing it, and what it said for whole regions.

use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use super::parts::OfVm;
use crate::policy::decision::PyRegion;

/// Who judges a machine's requests, and what a Python policy taught (``remember=``).
#[pyclass(name = "PolicyHandle", module = "pagegate", frozen)]
pub(crate) struct PyPolicyHandle(pub(crate) OfVm);

#[pymethods]
impl PyPolicyHandle {
    /// The policy, as it was given; ``None`` for the default.
    #[getter]
    fn current(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.0.parts.given(py)
    }

    /// Puts another policy in place, also while the machine runs.
    ///
    /// Each request is judged by one of them: what comes after this has returned by the new one, what is being judged
    /// meanwhile by the old one. What the old one taught goes with it. Raises PolicyError for an object that is no
    /// policy; then the old one stays.
    fn replace(&self, py: Python<'_>, policy: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.parts.replace(py, policy)
    }

    /// Forgets what was remembered about a region, or everything: the policy is asked again.
    #[pyo3(signature = (region = None))]
    fn forget(&self, py: Python<'_>, region: Option<&PyRegion>) {
        let hooks = self.0.parts.hooks();
        if let Some(hooks) = hooks {
            py.detach(|| hooks.forget(region.map(PyRegion::range)));
        }
    }

    /// Requests that the Python policy was asked about.
    #[getter]
    fn seen(&self) -> u64 {
        self.0.parts.hooks().map_or(0, |hooks| hooks.policy().asked())
    }

    /// Requests that it was spared, because it had said ``remember=``.
    #[getter]
    fn spared(&self) -> u64 {
        self.0.parts.hooks().map_or(0, |hooks| hooks.spared())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.traverse(&visit)
    }
}
