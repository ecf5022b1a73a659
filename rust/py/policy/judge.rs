//! Makes a policy of the core from any Python object that is one.

use std::sync::Arc;

use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::remember::Remember;
use pagegate_core::policy::simple::Allow;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use pyo3::{PyTraverseError, PyVisit};

use super::hooks::PyPolicy;

/// A policy as the core takes it, and the Python objects that it refers to.
pub(crate) struct Judge {
    pub(crate) policy: Arc<dyn Policy>,
    /// Whether a request may enter Python.
    pub(crate) enters_python: bool,
    held: Held,
}

/// The reference to a judge's Python objects. There is one, so that the garbage collector counts each object once.
enum Held {
    Nothing,
    Hooks(Arc<Remember<PyPolicy>>),
    Builtin(Py<PyBuiltin>),
}

impl Judge {
    /// For a built-in policy, an object with hooks, or `None`, which is `Allow`.
    pub(crate) fn of(policy: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let Some(policy) = policy else {
            return Ok(Self::native(Arc::new(Allow)));
        };
        if let Ok(builtin) = policy.cast::<PyBuiltin>() {
            let judge = &builtin.get().0;
            return Ok(Self {
                policy: judge.policy.clone(),
                enters_python: judge.enters_python,
                held: Held::Builtin(builtin.clone().unbind()),
            });
        }
        let hooks = Arc::new(Remember::new(PyPolicy::resolve(policy)?));
        let enters_python = hooks.policy().hooks().next().is_some();
        Ok(Self {
            policy: hooks.clone(),
            enters_python,
            held: Held::Hooks(hooks),
        })
    }

    fn native(policy: Arc<dyn Policy>) -> Self {
        Self {
            policy,
            enters_python: false,
            held: Held::Nothing,
        }
    }

    /// The Python policy that is asked at the end of the chain, if there is one.
    pub(crate) fn hooks(&self) -> Option<&Arc<Remember<PyPolicy>>> {
        match &self.held {
            Held::Nothing => None,
            Held::Hooks(hooks) => Some(hooks),
            Held::Builtin(builtin) => builtin.get().0.hooks(),
        }
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.held {
            Held::Nothing => Ok(()),
            Held::Hooks(hooks) => hooks.policy().hooks().try_for_each(|hook| visit.call(hook)),
            Held::Builtin(builtin) => visit.call(builtin),
        }
    }
}

/// The base class of the built-in policies.
#[pyclass(name = "Builtin", module = "pagegate.policies", frozen, subclass)]
pub(crate) struct PyBuiltin(pub(crate) Judge);

#[pymethods]
impl PyBuiltin {
    /// The Python policy's hooks at the end of the chain: memory_fault, map_gpa_range, memory_poison.
    ///
    /// ``None`` for each that there is not.
    #[getter]
    fn hooks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let hooks = self
            .0
            .hooks()
            .map_or_else(Default::default, |hooks| hooks.policy().cloned(py));
        PyTuple::new(py, hooks)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.0.traverse(&visit)
    }
}
