//! A Python policy, as a policy of the core.

use std::sync::atomic::{AtomicU64, Ordering};

use pagegate_core::error::Failure;
use pagegate_core::policy::decision::Decision;
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::request::{ExplicitRequest, ImplicitRequest};
use pagegate_core::policy::simple::Allow;
use pyo3::prelude::*;

use super::decision;
use super::request::{PyMapGpaRange, PyMemoryFault, PyMemoryPoison};
use crate::interpreter::attach::attached;
use crate::interpreter::{errors, reuse};

type Hook = Option<Py<PyAny>>;

/// A policy's hooks, looked up once.
pub(crate) struct PyPolicy {
    memory_fault: Hook,
    map_gpa_range: Hook,
    memory_poison: Hook,
    /// Requests that it was asked about.
    asked: AtomicU64,
}

impl PyPolicy {
    /// Finds and validates the hooks of any object.
    pub(super) fn resolve(policy: &Bound<'_, PyAny>) -> PyResult<Self> {
        let resolve = policy.py().import("pagegate.hooks")?.getattr("resolve")?;
        let (memory_fault, map_gpa_range, memory_poison) = resolve.call1((policy,))?.extract()?;
        Ok(Self {
            memory_fault,
            map_gpa_range,
            memory_poison,
            asked: AtomicU64::new(0),
        })
    }

    /// The hooks, in the order of `pagegate.hooks.NAMES`.
    pub(crate) fn cloned(&self, py: Python<'_>) -> [Hook; 3] {
        let clone = |hook: &Hook| hook.as_ref().map(|hook| hook.clone_ref(py));
        [&self.memory_fault, &self.map_gpa_range, &self.memory_poison].map(clone)
    }

    /// The hooks that it has.
    pub(crate) fn hooks(&self) -> impl Iterator<Item = &Py<PyAny>> {
        [&self.memory_fault, &self.map_gpa_range, &self.memory_poison]
            .into_iter()
            .flatten()
    }

    /// Requests that it was asked about.
    pub(crate) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    fn ask<T: reuse::HookArgument>(
        &self,
        hook: &Py<PyAny>,
        name: &'static str,
        question: &T::Question,
    ) -> Result<Decision, Failure> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        attached(|py| decision::read(&reuse::call::<T>(hook.bind(py), question)?, name)).map_err(errors::failure)
    }
}

/// Asks about a poisoned page. That is rare, so the object is not reused and the request not counted.
fn ask_about_poison(hook: &Py<PyAny>, poison: &ImplicitRequest) -> Result<Decision, Failure> {
    Python::attach(|py| {
        let request = Bound::new(py, PyMemoryPoison::of(poison))?;
        decision::read(&hook.bind(py).call1((request,))?, "memory_poison")
    })
    .map_err(errors::failure)
}

/// Frees the objects that this thread keeps for calling hooks. Called when it may not call hooks again.
pub(crate) fn forget_requests(_attached: Python<'_>) {
    reuse::forget::<PyMemoryFault>();
    reuse::forget::<PyMapGpaRange>();
}

impl Policy for PyPolicy {
    fn memory_fault(&self, fault: &ImplicitRequest) -> Result<Decision, Failure> {
        match &self.memory_fault {
            Some(hook) => self.ask::<PyMemoryFault>(hook, "memory_fault", fault),
            None => Allow.memory_fault(fault),
        }
    }

    fn map_gpa_range(&self, call: &ExplicitRequest) -> Result<Decision, Failure> {
        match &self.map_gpa_range {
            Some(hook) => self.ask::<PyMapGpaRange>(hook, "map_gpa_range", call),
            None => Allow.map_gpa_range(call),
        }
    }

    fn memory_poison(&self, poison: &ImplicitRequest) -> Result<Decision, Failure> {
        match &self.memory_poison {
            Some(hook) => ask_about_poison(hook, poison),
            None => Allow.memory_poison(poison),
        }
    }
}
