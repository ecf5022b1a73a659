//! Converts the core's errors to Python exceptions.

use pagegate_core::error::{ConvertError, Error, Failure, Site};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyType;

const MODULE: &str = "pagegate.errors";

fn new(py: Python<'_>, class: &str, message: String) -> PyErr {
    let make = || -> PyResult<PyErr> {
        let class = py.import(MODULE)?.getattr(class)?.cast_into::<PyType>()?;
        Ok(PyErr::from_type(class, message))
    };
    make().unwrap_or_else(|error| error)
}

pub(crate) fn policy_error(py: Python<'_>, message: String) -> PyErr {
    new(py, "PolicyError", message)
}

pub(crate) fn busy(py: Python<'_>, message: &str) -> PyErr {
    new(py, "PagegateError", message.to_owned())
}

/// Wraps what a hook raised, for the core to pass on.
pub(crate) fn failure(error: PyErr) -> Failure {
    Box::new(error)
}

/// The exception for an error of the core. Its attributes say where it happened.
pub(crate) fn raise(py: Python<'_>, error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::KvmUnavailable(_) => new(py, "KvmUnavailable", message),
        Error::NotSupported(_) => new(py, "NotSupported", message),
        Error::Invalid(_) | Error::Outside { .. } | Error::HostConversion(ConvertError::Range { .. }) => {
            PyValueError::new_err(message)
        }
        Error::HostConversion(ConvertError::Listener(failure)) => {
            downcast(failure).unwrap_or_else(|failure| busy(py, &failure.to_string()))
        }
        Error::Busy(_) | Error::Host { .. } | Error::HostConversion(_) => new(py, "PagegateError", message),
        Error::PrivateMemory { gpa, .. } => {
            let error = new(py, "PrivateMemoryError", message);
            set(py, &error, "gpa", gpa);
            set(py, &error, "state", "private");
            error
        }
        Error::BadBacking { site, .. } => at(py, new(py, "BadBacking", message), &site),
        Error::Livelock { site, .. } => at(py, new(py, "Livelock", message), &site),
        Error::Conversion { site, .. } | Error::Exit { site, .. } => at(py, new(py, "PagegateError", message), &site),
        Error::Hook { site, failure } => hook(py, failure, &site),
        Error::Interrupted(failure) => downcast(failure).unwrap_or_else(|failure| busy(py, &failure.to_string())),
    }
}

/// The exception that the hook raised, with notes, or a PolicyError for an answer that the core did not accept.
fn hook(py: Python<'_>, failure: Failure, site: &Site) -> PyErr {
    match downcast(failure) {
        Ok(error) => {
            let mut notes = vec![format!("vCPU {}", site.vcpu)];
            notes.extend(site.gpa.map(|gpa| format!("gpa {gpa:#x}")));
            notes.extend(site.state.map(|state| format!("state {state}")));
            notes.push(format!("rip {:#x}", site.rip));
            for note in notes {
                // An exception class can override add_note and fail; the exception itself matters more.
                let _ = error.value(py).call_method1("add_note", (note,));
            }
            match is_policy_error(py, &error) {
                true => at(py, error, site),
                false => error,
            }
        }
        Err(failure) => at(py, policy_error(py, format!("{site}: {failure}")), site),
    }
}

/// Whether it is the PolicyError that the binding raises for a wrong answer, and not the hook's own exception.
fn is_policy_error(py: Python<'_>, error: &PyErr) -> bool {
    let class = py.import(MODULE).and_then(|errors| errors.getattr("PolicyError"));
    class.is_ok_and(|class| error.get_type(py).is(&class))
}

fn downcast(failure: Failure) -> Result<PyErr, Failure> {
    failure.downcast::<PyErr>().map(|error| *error)
}

fn at(py: Python<'_>, error: PyErr, site: &Site) -> PyErr {
    set(py, &error, "vcpu", site.vcpu);
    set(py, &error, "gpa", site.gpa);
    set(py, &error, "state", site.state);
    set(py, &error, "rip", site.rip);
    error
}

fn set<'py>(py: Python<'py>, error: &PyErr, name: &str, value: impl IntoPyObject<'py>) {
    // The classes are defined in pagegate.errors and take any attribute.
    let _ = error.value(py).setattr(name, value);
}
