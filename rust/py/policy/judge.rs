//! Makes a policy of the core from any Python object that is one.

use std::sync::Arc;

use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::remember::Remember;
use pagegate_core::policy::simple::Allow;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use pyo3::{PyTraverseError, PyVisit};

use super::hooks::PyPolicy;
use crate::interpreter::call::{self, Owned};

/// A policy as the core takes it, and the Python objects that it refers to.
pub(crate) struct Judge {
    pub(crate) policy: Arc<dyn Policy>,
    /// Whether a request may enter Python.
    pub(crate) enters_python: bool,
    /// How many policies ask each other, from this one on.
    pub(crate) length: usize,
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
            let judge = &builtin.get().judge;
            return Ok(Self {
                policy: judge.policy.clone(),
                enters_python: judge.enters_python,
                length: judge.length,
                held: Held::Builtin(builtin.clone().unbind()),
            });
        }
        let hooks = Arc::new(Remember::new(PyPolicy::resolve(policy)?));
        let enters_python = hooks.policy().judges();
        Ok(Self {
            policy: hooks.clone(),
            enters_python,
            length: 1,
            held: Held::Hooks(hooks),
        })
    }

    fn native(policy: Arc<dyn Policy>) -> Self {
        Self {
            policy,
            enters_python: false,
            length: 1,
            held: Held::Nothing,
        }
    }

    /// The Python policy that is asked at the end of the chain, if there is one.
    pub(crate) fn hooks(&self) -> Option<&Arc<Remember<PyPolicy>>> {
        match &self.held {
            Held::Nothing => None,
            Held::Hooks(hooks) => Some(hooks),
            Held::Builtin(builtin) => builtin.get().judge.hooks(),
        }
    }

    /// The Python objects that it refers to, once more.
    pub(crate) fn objects<'py>(&self, py: Python<'py>) -> Vec<Owned<'py>> {
        match &self.held {
            Held::Nothing => Vec::new(),
            Held::Hooks(hooks) => hooks.policy().hooks().map(|hook| Owned::another(py, hook)).collect(),
            Held::Builtin(builtin) => vec![Owned::another(py, builtin.as_any())],
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
pub(crate) struct PyBuiltin {
    pub(crate) judge: Judge,
    /// How it was made: the name of its class, and what it was given but for ``then``.
    made: (&'static str, Vec<String>),
}

impl PyBuiltin {
    pub(super) fn new(judge: Judge, made: (&'static str, Vec<String>)) -> Self {
        Self { judge, made }
    }
}

#[pymethods]
impl PyBuiltin {
    /// The Python policy's hooks at the end of the chain: those of ``Policy``, in their order.
    ///
    /// ``None`` for each that there is not.
    #[getter]
    fn hooks<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let hooks = self
            .judge
            .hooks()
            .map_or_else(Default::default, |hooks| hooks.policy().cloned(py));
        PyTuple::new(py, hooks)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.judge.traverse(&visit)
    }

    /// How the chain is written. Not by recursion: it may be long.
    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let mut text = String::new();
        let (mut at, mut depth) = (slf.clone(), 0);
        loop {
            let (name, arguments) = &at.get().made;
            text += &format!("{name}({}", arguments.join(", "));
            depth += 1;
            let comma = if arguments.is_empty() { "" } else { ", " };
            let next = match &at.get().judge.held {
                Held::Nothing => break,
                Held::Builtin(builtin) => builtin.bind(slf.py()).clone(),
                Held::Hooks(hooks) => {
                    text += &format!("{comma}{}", owner(slf.py(), hooks.policy())?);
                    break;
                }
            };
            text += comma;
            at = next;
        }
        Ok(text + &")".repeat(depth))
    }
}

/// The repr of the object that the hooks are methods of.
fn owner(py: Python<'_>, policy: &PyPolicy) -> PyResult<String> {
    let Some(hook) = policy.hooks().next() else {
        return Ok("Policy()".to_owned());
    };
    match hook.bind(py).getattr_opt("__self__")? {
        Some(owner) if !owner.is_none() => call::repr(&owner),
        _ => call::repr(hook.bind(py)),
    }
}
