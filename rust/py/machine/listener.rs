//! Python objects that are told of conversions.

use pagegate_core::error::Failure;
use pagegate_core::memory::listeners::{Change, Listener};
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::interpreter::attach::attached;
use crate::interpreter::{call, errors};

/// Pages that are converted, all of them from one state to the other, as a listener is told.
#[pyclass(name = "Change", module = "pagegate", frozen, get_all)]
pub(crate) struct PyChange {
    /// Start in bytes, without the view bit.
    gpa: u64,
    /// Length in bytes.
    size: u64,
    /// The state that they are converted to.
    to: &'static str,
    /// Whether they are in that state already.
    ///
    /// A new listener is told of the present states first, and one that failed of those of the pages concerned.
    initial: bool,
}

#[pymethods]
impl PyChange {
    fn __repr__(&self) -> String {
        let Self { gpa, size, to, .. } = self;
        let initial = if self.initial { ", initial=True" } else { "" };
        format!("Change(gpa={gpa:#x}, size={size:#x}, to={to:?}{initial})")
    }
}

type Method = Option<Py<PyAny>>;

/// A listener's methods, looked up once.
pub(crate) struct PyListener {
    object: Py<PyAny>,
    prepare: Method,
    committed: Method,
    aborted: Method,
}

impl PyListener {
    pub(crate) fn resolve(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let resolve = object.py().import("pagegate.hooks")?.getattr("resolve_listener")?;
        let [prepare, committed, aborted] = call::call(&resolve, object)?.extract()?;
        Ok(Self {
            object: object.clone().unbind(),
            prepare,
            committed,
            aborted,
        })
    }

    pub(crate) fn object(&self) -> &Py<PyAny> {
        &self.object
    }

    pub(crate) fn is(&self, object: &Bound<'_, PyAny>) -> bool {
        self.object.is(object)
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.object)?;
        let methods = [&self.prepare, &self.committed, &self.aborted];
        methods.into_iter().flatten().try_for_each(|method| visit.call(method))
    }
}

/// Calls a method, if there is one. Returns false only if the method returned `False`.
fn tell(method: &Method, change: &Change) -> Result<bool, Failure> {
    let Some(method) = method else {
        return Ok(true);
    };
    attached(|py| {
        let change = PyChange {
            gpa: change.range.gpa(),
            size: change.range.size(),
            to: change.to.as_str(),
            initial: change.initial,
        };
        let answer = call::call(method.bind(py), Bound::new(py, change)?.as_any())?;
        if answer.is_none() {
            return Ok(true);
        }
        match answer.extract::<bool>() {
            Ok(agreed) => Ok(agreed),
            Err(_) => {
                let answer = call::repr(&answer)?;
                let message = format!("a listener answered {answer}: it returns True or None, or False to refuse");
                Err(errors::policy_error(py, message))
            }
        }
    })
}

impl Listener for PyListener {
    fn prepare(&self, change: &Change) -> Result<bool, Failure> {
        tell(&self.prepare, change)
    }

    fn committed(&self, change: &Change) -> Result<(), Failure> {
        tell(&self.committed, change).map(drop)
    }

    fn aborted(&self, change: &Change) -> Result<(), Failure> {
        tell(&self.aborted, change).map(drop)
    }
}
