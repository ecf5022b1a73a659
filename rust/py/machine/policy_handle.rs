//! ``vm.policy``: the policy in place and its remembered decisions.

use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use super::parts::OfVm;
use crate::interpreter::arguments;
use crate::interpreter::call;
use crate::policy::decision::PyRegion;

/// The policy that judges a machine's requests, and its remembered decisions (``remember=``).
#[pyclass(name = "PolicyHandle", module = "pagegate", frozen)]
pub(crate) struct PyPolicyHandle(pub(crate) OfVm);

#[pymethods]
impl PyPolicyHandle {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let current = match self.current(py) {
            Some(policy) => call::repr(policy.bind(py))?,
            None => "everything is converted as asked".to_owned(),
        };
        let (seen, spared) = (self.seen(), self.spared());
        Ok(format!(
            "<pagegate.PolicyHandle: {current}, seen {seen}, spared {spared}>"
        ))
    }

    /// The policy as it was given; ``None`` for the default, which converts as asked.
    #[getter]
    fn current(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        self.0.parts.given(py)
    }

    /// Puts another policy in place, also while the machine runs.
    ///
    /// Each request is judged by one of the two: those that come after this has returned by the new one, those that are
    /// being judged meanwhile by the old one. ``seen``, ``spared`` and the remembered decisions are those of the new
    /// one; a built-in policy keeps those of the Python policy in its chain, also while it is not in place. The new
    /// one's ``configure`` is called before. Raises PolicyError for an object that is no policy, and the old one
    /// stays; PagegateError if the machine is closed.
    fn replace(&self, py: Python<'_>, policy: &Bound<'_, PyAny>) -> PyResult<()> {
        self.0.parts.replace(self.0.vm.bind(py), policy)
    }

    /// Drops remembered decisions for the pages of a region, or all: the policy is asked again.
    #[pyo3(signature = (region = None))]
    fn forget(&self, py: Python<'_>, #[pyo3(from_py_with = of_region)] region: Option<PyRegion>) {
        let hooks = self.0.parts.hooks();
        if let Some(hooks) = hooks {
            py.detach(|| hooks.forget(region.as_ref().map(PyRegion::range)));
        }
    }

    /// Requests that the Python policy was asked about; poisoned pages are not counted.
    #[getter]
    fn seen(&self) -> u64 {
        self.0.parts.hooks().map_or(0, |hooks| hooks.policy().asked())
    }

    /// Requests that were answered by a remembered decision, without asking the policy.
    #[getter]
    fn spared(&self) -> u64 {
        self.0.parts.hooks().map_or(0, |hooks| hooks.spared())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.traverse(&visit)
    }
}

/// Which decisions are forgotten.
fn of_region(value: &Bound<'_, PyAny>) -> PyResult<Option<PyRegion>> {
    arguments::extract::<arguments::named::region, _>(value, "a Region, or None")
}
