//! What a ``Vm`` and its objects (``vm.policy``, ``vm.events`` ...) share: the core's machine, and the Python objects that
//! it calls.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagegate_core::machine::assembly::Machine;
use pagegate_core::policy::remember::Remember;
use pagegate_core::trace::about::About;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use super::device_io::Handler;
use super::listener::PyListener;
use crate::interpreter::errors;
use crate::policy::hooks::PyPolicy;
use crate::policy::judge::Judge;

/// The Python objects that a machine refers to, for the garbage collector.
pub(super) struct Callbacks {
    pub judge: Judge,
    /// The policy as it was given.
    pub policy: Option<Py<PyAny>>,
    pub handlers: Vec<Arc<Handler>>,
    pub listeners: Vec<Arc<PyListener>>,
}

/// What a ``Vm`` is made of.
pub(crate) struct Parts {
    pub(super) machine: Mutex<Option<Arc<Machine>>>,
    pub(super) callbacks: Mutex<Option<Callbacks>>,
    /// Whether a vCPU thread may call Python, so that it needs a thread state.
    pub(super) enters_python: Arc<AtomicBool>,
    pub(crate) memory: u64,
    /// The page states before the first event, for traces made of the log.
    pub(crate) about: About,
    pub(super) shared_bit: Option<u32>,
    pub(super) enforcement: &'static str,
}

/// The parts of a ``Vm`` for an object that belongs to it, and the ``Vm``, which that object keeps alive.
pub(crate) struct OfVm {
    pub vm: Py<PyAny>,
    pub parts: Arc<Parts>,
}

impl OfVm {
    pub(crate) fn machine(&self, py: Python<'_>) -> PyResult<Arc<Machine>> {
        self.parts.machine(py)
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.vm)
    }
}

/// Ignores poisoning: no code that holds these locks panics half-way.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Parts {
    pub(crate) fn machine(&self, py: Python<'_>) -> PyResult<Arc<Machine>> {
        let machine = lock(&self.machine).clone();
        machine.ok_or_else(|| errors::busy(py, "this machine is closed"))
    }

    /// The policy as it was given.
    pub(crate) fn given(&self, py: Python<'_>) -> Option<Py<PyAny>> {
        let callbacks = lock(&self.callbacks);
        callbacks.as_ref()?.policy.as_ref().map(|policy| policy.clone_ref(py))
    }

    /// The Python policy at the end of the chain.
    pub(crate) fn hooks(&self) -> Option<Arc<Remember<PyPolicy>>> {
        lock(&self.callbacks).as_ref()?.judge.hooks().cloned()
    }

    pub(crate) fn replace(&self, py: Python<'_>, policy: &Bound<'_, PyAny>) -> PyResult<()> {
        let judge = Judge::of(Some(policy))?;
        let machine = self.machine(py)?;
        if judge.enters_python {
            self.enters_python.store(true, Ordering::Relaxed);
        }
        let given = Some(policy.clone().unbind());
        let old = match lock(&self.callbacks).as_mut() {
            Some(callbacks) => {
                machine.replace_policy(judge.policy.clone());
                let judge = std::mem::replace(&mut callbacks.judge, judge);
                Some((judge, std::mem::replace(&mut callbacks.policy, given)))
            }
            None => None,
        };
        // Not with the lock held: dropping the old policy may run Python code.
        drop(old);
        Ok(())
    }

    pub(super) fn keep(&self, handler: &Arc<Handler>) {
        if let Some(callbacks) = lock(&self.callbacks).as_mut() {
            callbacks.handlers.push(handler.clone());
        }
        self.enters_python.store(true, Ordering::Relaxed);
    }
}
