//! What a ``Vm`` and its objects (``vm.policy``, ``vm.events`` ...) share: the core's machine, and the Python objects that
//! it calls.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use pagegate_core::events::log::EventLog;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::current::Watched;
use pagegate_core::memory::address::State;
use pagegate_core::memory::listeners::Listener;
use pagegate_core::policy::remember::Remember;
use pagegate_core::trace::about::About;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::{PyTraverseError, PyVisit};

use super::device_io::Handler;
use super::listener::PyListener;
use super::missing::PyPager;
use super::report::PyReport;
use crate::devices::python::PyDevice;
use crate::interpreter::call::Owned;
use crate::interpreter::overdue::Overdue;
use crate::interpreter::{ending, errors};
use crate::policy::hooks::{Moment, PyPolicy};
use crate::policy::judge::Judge;

/// The Python objects that a machine refers to, for the garbage collector.
pub(super) struct Callbacks {
    pub judge: Judge,
    /// The policy as it was given.
    pub policy: Option<Py<PyAny>>,
    pub handlers: Vec<Arc<Handler>>,
    pub listeners: Vec<Arc<PyListener>>,
    pub devices: Vec<Arc<PyDevice>>,
    pub pager: Option<Arc<PyPager>>,
}

impl Callbacks {
    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.judge.traverse(visit)?;
        if let Some(policy) = &self.policy {
            visit.call(policy)?;
        }
        for handler in &self.handlers {
            visit.call(&handler.0)?;
        }
        for listener in &self.listeners {
            listener.traverse(visit)?;
        }
        for device in &self.devices {
            device.traverse(visit)?;
        }
        self.pager.as_ref().map_or(Ok(()), |pager| pager.traverse(visit))
    }

    /// Drops them.
    fn release(self, py: Python<'_>) {
        let mut last = self.judge.objects(py);
        last.extend(self.policy.iter().map(|policy| Owned::another(py, policy)));
        last.extend(self.handlers.iter().map(|handler| Owned::another(py, &handler.0)));
        last.extend(
            self.listeners
                .iter()
                .map(|listener| Owned::another(py, listener.object())),
        );
        let pager = self.pager.iter().flat_map(|pager| pager.object());
        last.extend(pager.map(|object| Owned::another(py, object)));
        last.extend(self.devices.iter().map(|device| Owned::another(py, device.object())));
        drop(self);
        drop(last);
    }
}

/// What a ``Vm`` is made of.
pub(crate) struct Parts {
    pub(super) machine: Mutex<Option<Arc<Machine>>>,
    pub(super) callbacks: Mutex<Option<Callbacks>>,
    /// Whether a vCPU thread may call Python, so that it needs a thread state.
    pub(super) enters_python: Arc<AtomicBool>,
    /// `policy_timeout`.
    pub(super) overdue: Option<Arc<Overdue>>,
    pub(crate) memory: u64,
    /// Of the last run.
    pub(super) report: Mutex<Option<Py<PyReport>>>,
    /// The Python policy that has been told of this machine.
    pub(super) configured: Mutex<Weak<Remember<PyPolicy>>>,
    /// The machine's log, which can be read when the machine is closed, too.
    events: Arc<EventLog>,
    /// The page states before the first event, for traces made of the log.
    about: Mutex<About>,
    /// What ``vm.console`` is, made when it is first asked for.
    pub(super) console: PyOnceLock<Py<PyAny>>,
    pub(super) shared_bit: Option<u32>,
    pub(super) private_bit: Option<u32>,
    pub(super) platform: &'static str,
    pub(super) confidential: Option<&'static str>,
    pub(super) enforcement: &'static str,
}

/// The parts of a ``Vm`` for an object that belongs to it, and the ``Vm``, which that object keeps alive.
pub(crate) struct OfVm {
    pub vm: Py<PyAny>,
    pub parts: Arc<Parts>,
}

impl Parts {
    pub(super) fn of(
        machine: Machine,
        judge: Judge,
        policy: Option<&Bound<'_, PyAny>>,
        enters_python: Arc<AtomicBool>,
        overdue: Option<Arc<Overdue>>,
        pager: Option<Arc<PyPager>>,
    ) -> Self {
        let machine = Arc::new(machine);
        if pager.is_some() {
            ending::has_pager(&machine);
        }
        let views = *machine.memory().views();
        Self {
            memory: machine.memory().size(),
            events: machine.events().clone(),
            about: Mutex::new(About::now(machine.events(), machine.memory(), machine.debug_private())),
            console: PyOnceLock::new(),
            report: Mutex::default(),
            configured: Mutex::default(),
            shared_bit: views.bit_of(State::Shared),
            private_bit: views.bit_of(State::Private),
            platform: if machine.console().is_ok() { "pc" } else { "bare" },
            confidential: machine.is_confidential().then_some("sev"),
            enforcement: machine.enforcement().as_str(),
            machine: Mutex::new(Some(machine)),
            callbacks: Mutex::new(Some(Callbacks {
                judge,
                policy: policy.map(|policy| policy.clone().unbind()),
                handlers: Vec::new(),
                listeners: Vec::new(),
                devices: Vec::new(),
                pager,
            })),
            enters_python,
            overdue,
        }
    }
}

impl Parts {
    /// The page states before the first event, for traces made of the log.
    pub(crate) fn about(&self) -> About {
        lock(&self.about).clone()
    }

    /// No event has been logged yet, and page states are others than when the machine was made.
    pub(super) fn is_new(&self, machine: &Machine) {
        *lock(&self.about) = About::now(machine.events(), machine.memory(), machine.debug_private());
    }
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

/// What is in it, still in it.
pub(super) fn held<T: Clone>(mutex: &Mutex<Option<T>>) -> Option<T> {
    lock(mutex).clone()
}

/// What was in it. The caller drops it without the lock: that may run Python code, which may want the lock.
pub(super) fn taken<T>(mutex: &Mutex<Option<T>>) -> Option<T> {
    lock(mutex).take()
}

impl Drop for Parts {
    fn drop(&mut self) {
        drop(taken(&self.machine));
        Python::try_attach(|py| {
            self.release(py);
            drop(taken(&self.report));
        });
    }
}

impl Parts {
    pub(crate) fn machine(&self, py: Python<'_>) -> PyResult<Arc<Machine>> {
        ending::still_going(py)?;
        held(&self.machine).ok_or_else(|| errors::busy(py, "this machine is closed"))
    }

    /// Whether the machine is closed.
    pub(super) fn closed(&self) -> bool {
        lock(&self.machine).is_none()
    }

    /// The machine's log, also of one that is closed.
    pub(super) fn events(&self, py: Python<'_>) -> PyResult<&Arc<EventLog>> {
        ending::still_going(py)?;
        Ok(&self.events)
    }

    /// The run in progress, else the last one, else the first that there will be; `None` if the machine is closed.
    pub(super) fn watched(&self) -> Option<Arc<Watched>> {
        held(&self.machine).map(|machine| machine.watched())
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

    /// What a collector of garbage finds here.
    pub(super) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        // If the lock is taken, a call is in progress; it refers to the machine, which therefore is no garbage.
        if let Ok(Some(callbacks)) = self.callbacks.try_lock().as_deref() {
            callbacks.traverse(visit)?;
        }
        Ok(())
    }

    /// Drops the machine's Python objects, which may run their finalizers.
    pub(super) fn release(&self, py: Python<'_>) {
        if let Some(callbacks) = taken(&self.callbacks) {
            callbacks.release(py);
        }
    }

    /// Tells the Python policy of a machine, unless it has been told.
    pub(super) fn configure(&self, hooks: Option<&Arc<Remember<PyPolicy>>>, vm: &Bound<'_, PyAny>) -> PyResult<()> {
        let Some(hooks) = hooks else {
            return Ok(());
        };
        let before = std::mem::replace(&mut *lock(&self.configured), Arc::downgrade(hooks));
        match before.ptr_eq(&Arc::downgrade(hooks)) {
            true => Ok(()),
            false => hooks.policy().tell(Moment::Configure, vm).inspect_err(|_| {
                // It is told again when the next run begins.
                *lock(&self.configured) = Weak::new();
            }),
        }
    }

    pub(crate) fn replace(&self, vm: &Bound<'_, PyAny>, policy: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = vm.py();
        let judge = Judge::of(Some(policy))?;
        let machine = self.machine(py)?;
        self.configure(judge.hooks(), vm)?;
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
        if let Some((judge, policy)) = old {
            let mut last = judge.objects(py);
            last.extend(policy.map(|policy| policy.into_bound(py).into()));
            drop(judge);
            drop(last);
        }
        Ok(())
    }

    pub(super) fn add_listener(&self, py: Python<'_>, listener: &Bound<'_, PyAny>) -> PyResult<()> {
        let machine = self.machine(py)?;
        let listener = Arc::new(PyListener::resolve(listener)?);
        let joined = py.detach(|| machine.add_listener(listener.clone()));
        joined.map_err(|error| errors::raise(py, error))?;
        if let Some(callbacks) = lock(&self.callbacks).as_mut() {
            callbacks.listeners.push(listener);
        }
        self.enters_python.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn remove_listener(&self, py: Python<'_>, listener: &Bound<'_, PyAny>) -> PyResult<()> {
        let machine = self.machine(py)?;
        let known = {
            let mut callbacks = lock(&self.callbacks);
            let listeners = callbacks.as_mut().map(|callbacks| &mut callbacks.listeners);
            listeners.and_then(|listeners| {
                let at = listeners.iter().position(|known| known.is(listener))?;
                Some(listeners.remove(at))
            })
        };
        let Some(known) = known else {
            return Err(PyValueError::new_err("this object is no listener of this machine"));
        };
        let known: Arc<dyn Listener> = known;
        py.detach(|| machine.remove_listener(&known));
        Ok(())
    }

    pub(super) fn keep_device(&self, device: Arc<PyDevice>) {
        if let Some(callbacks) = lock(&self.callbacks).as_mut() {
            callbacks.devices.push(device);
        }
        self.enters_python.store(true, Ordering::Relaxed);
    }

    pub(super) fn keep(&self, handler: &Arc<Handler>) {
        if let Some(callbacks) = lock(&self.callbacks).as_mut() {
            callbacks.handlers.push(handler.clone());
        }
        self.enters_python.store(true, Ordering::Relaxed);
    }
}
