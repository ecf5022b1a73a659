//! A Python policy as the core sees it.

use std::sync::Arc;

use pagegate_core::error::Failure;
use pagegate_core::policies::Request;
use pagegate_core::policy::{Allow, Call, Decision, Fault, Policy};
use pagegate_core::rules::{Lesson, Rules};
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::attach::attached;
use crate::policies::PyBuiltin;
use crate::request::{PyMapGpaRange, PyMemoryFault, PyMemoryPoison};
use crate::{decision, errors, reuse};

type Hook = Option<Py<PyAny>>;

/// A policy's hooks, resolved once, and what it taught.
pub(crate) struct PyPolicy {
    pub(crate) rules: Rules,
    memory_fault: Hook,
    map_gpa_range: Hook,
    memory_poison: Hook,
}

/// Whatever judges, as the core takes it, and what of Python that refers to.
pub(crate) struct Judge {
    pub(crate) policy: Arc<dyn Policy>,
    /// Whether a request may enter Python.
    pub(crate) enters_python: bool,
    held: Held,
}

/// What keeps a judge's Python objects alive: each is one reference, visited by one owner.
enum Held {
    Nothing,
    Hooks(Arc<PyPolicy>),
    Builtin(Py<PyBuiltin>),
}

impl Judge {
    /// Of a built-in policy, of any object with hooks, or of nothing, which leaves all to the defaults.
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
        let hooks = Arc::new(PyPolicy::resolve(policy)?);
        let enters_python = hooks.hooks().any(Option::is_some);
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
    pub(crate) fn hooks(&self) -> Option<&Arc<PyPolicy>> {
        match &self.held {
            Held::Nothing => None,
            Held::Hooks(hooks) => Some(hooks),
            Held::Builtin(builtin) => builtin.get().0.hooks(),
        }
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        match &self.held {
            Held::Nothing => Ok(()),
            Held::Hooks(hooks) => hooks.hooks().flatten().try_for_each(|hook| visit.call(hook)),
            Held::Builtin(builtin) => visit.call(builtin),
        }
    }
}

impl PyPolicy {
    /// Finds and validates the hooks of any object.
    fn resolve(policy: &Bound<'_, PyAny>) -> PyResult<Self> {
        let resolve = policy.py().import("pagegate.hooks")?.getattr("resolve")?;
        let (memory_fault, map_gpa_range, memory_poison) = resolve.call1((policy,))?.extract()?;
        Ok(Self {
            rules: Rules::default(),
            memory_fault,
            map_gpa_range,
            memory_poison,
        })
    }

    /// In the order of their names in Python.
    pub(crate) fn cloned(&self, py: Python<'_>) -> [Hook; 3] {
        let clone = |hook: &Hook| hook.as_ref().map(|hook| hook.clone_ref(py));
        [&self.memory_fault, &self.map_gpa_range, &self.memory_poison].map(clone)
    }

    fn hooks(&self) -> impl Iterator<Item = &Hook> {
        [&self.memory_fault, &self.map_gpa_range, &self.memory_poison].into_iter()
    }
}

/// Asks a hook about a request.
fn ask<T: reuse::Request>(hook: &Py<PyAny>, name: &'static str, question: &T::Question) -> Result<Lesson, Failure> {
    attached(|py| decision::read(&reuse::call::<T>(hook.bind(py), question)?, name)).map_err(errors::failure)
}

/// The same about a poisoned page, which is rare.
fn ask_about_poison(hook: &Py<PyAny>, poison: &Fault) -> Result<Lesson, Failure> {
    Python::attach(|py| {
        let request = Bound::new(py, PyMemoryPoison::of(poison))?;
        decision::read(&hook.bind(py).call1((request,))?, "memory_poison")
    })
    .map_err(errors::failure)
}

/// Frees what a thread keeps for asking hooks, for one that may not do so again.
pub(crate) fn forget_requests(_attached: Python<'_>) {
    reuse::forget::<PyMemoryFault>();
    reuse::forget::<PyMapGpaRange>();
}

impl Policy for PyPolicy {
    fn memory_fault(&self, fault: &Fault) -> Result<Decision, Failure> {
        match &self.memory_fault {
            Some(hook) => self.rules.ask(Request::Implicit(fault), || {
                ask::<PyMemoryFault>(hook, "memory_fault", fault)
            }),
            None => Allow.memory_fault(fault),
        }
    }

    fn map_gpa_range(&self, call: &Call) -> Result<Decision, Failure> {
        match &self.map_gpa_range {
            Some(hook) => self.rules.ask(Request::Explicit(call), || {
                ask::<PyMapGpaRange>(hook, "map_gpa_range", call)
            }),
            None => Allow.map_gpa_range(call),
        }
    }

    fn memory_poison(&self, poison: &Fault) -> Result<Decision, Failure> {
        match &self.memory_poison {
            Some(hook) => {
                let lesson = ask_about_poison(hook, poison)?;
                match lesson.remember {
                    None => Ok(lesson.decision),
                    Some(_) => Err("memory_poison cannot answer with remember: each poisoned page is news".into()),
                }
            }
            None => Allow.memory_poison(poison),
        }
    }
}
