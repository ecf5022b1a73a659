//! Converts the core's errors to Python exceptions.

use pagegate_core::error::{ConvertError, Error, Failure, Site};
use pagegate_core::input::InputError;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyString, PyType};

use super::call;

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

/// A device's request could not be accessed.
pub(crate) fn device_access(py: Python<'_>, message: String) -> PyErr {
    new(py, "DeviceAccessError", message)
}

/// Whether it is that exception.
pub(crate) fn is_device_access(py: Python<'_>, error: &PyErr) -> bool {
    is_a(py, error, "DeviceAccessError")
}

pub(crate) fn busy(py: Python<'_>, message: &str) -> PyErr {
    new(py, "PagegateError", message.to_owned())
}

/// The exception that a call gets which takes too long.
pub(crate) fn policy_timeout(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    py.import(MODULE)?.getattr("PolicyTimeoutError")
}

/// Wraps what a hook raised, for the core to pass on.
pub(crate) fn failure(error: PyErr) -> Failure {
    Box::new(error)
}

/// The exception for an error of the core. Its attributes say where it happened.
///
/// Only for what no hook raised is the error's text made: a hook's exception has a `__str__`, which is not to be called.
pub(crate) fn raise(py: Python<'_>, error: Error) -> PyErr {
    match error {
        Error::KvmUnavailable(_) => new(py, "KvmUnavailable", error.to_string()),
        Error::NotSupported(_) => new(py, "NotSupported", error.to_string()),
        Error::Invalid(_) | Error::Outside { .. } | Error::HostConversion(ConvertError::Range { .. }) => {
            PyValueError::new_err(error.to_string())
        }
        Error::HostConversion(error) => match error.into_listeners() {
            Ok((failure, done)) => noted(
                py,
                downcast(failure).unwrap_or_else(|failure| busy(py, &failure.to_string())),
                done,
            ),
            Err(error) => new(py, "PagegateError", error.to_string()),
        },
        Error::Device { device, failure } => match downcast(failure) {
            Ok(error) => noted(py, error, [format!("device {device}")]),
            Err(failure) => busy(py, &format!("device {device}: {failure}")),
        },
        Error::DeviceHook { access, failure } => match downcast(failure) {
            Ok(error) => noted(py, error, [access]),
            Err(failure) => policy_error(py, format!("{access}: {failure}")),
        },
        Error::Pager {
            gpa,
            ref by,
            vcpu,
            failure,
            ..
        } => {
            let error = match downcast(failure) {
                Ok(error) => return noted(py, error, [format!("pager of gpa {gpa:#x}, which {by} touched")]),
                Err(failure) => new(
                    py,
                    "PagegateError",
                    Error::Pager {
                        gpa,
                        by: by.clone(),
                        vcpu,
                        failure,
                    }
                    .to_string(),
                ),
            };
            set(py, &error, "gpa", gpa);
            set(py, &error, "vcpu", vcpu);
            error
        }
        Error::File { path, errno } => of_file(&errno.into(), &path),
        Error::Busy(_) | Error::Host { .. } | Error::Lost(_) => new(py, "PagegateError", error.to_string()),
        Error::PrivateMemory { gpa, .. } => {
            let error = new(py, "PrivateMemoryError", error.to_string());
            set(py, &error, "gpa", gpa);
            set(py, &error, "state", "private");
            error
        }
        Error::BadBacking { ref site, .. } => at(py, new(py, "BadBacking", error.to_string()), site),
        Error::Livelock {
            ref site,
            ref executing,
            ..
        } => {
            let error = at(py, new(py, "Livelock", error.to_string()), site);
            set(py, &error, "instruction", executing.instruction.as_deref());
            set(py, &error, "cr2", executing.cr2);
            error
        }
        Error::Conversion { site, source } => match source.into_listeners() {
            Ok((failure, done)) => noted(py, hook(py, failure, &site), done),
            Err(error) => at(py, new(py, "PagegateError", format!("{site}: {error}")), &site),
        },
        Error::Exit { ref site, .. } => at(py, new(py, "PagegateError", error.to_string()), site),
        Error::Hook { site, failure } => hook(py, failure, &site),
        Error::Interrupted(failure) => downcast(failure).unwrap_or_else(|failure| busy(py, &failure.to_string())),
    }
}

/// The exception for the error that ended a run. One of this package's has the run's report.
pub(crate) fn of_run<'py>(py: Python<'py>, error: Error, report: &Bound<'py, PyAny>) -> PyErr {
    let error = raise(py, error);
    if is_a(py, &error, "PagegateError") {
        set(py, &error, "report", report);
    }
    error
}

/// The exception that the hook raised, with notes, or a PolicyError for an answer that the core did not accept.
fn hook(py: Python<'_>, failure: Failure, site: &Site) -> PyErr {
    match downcast(failure) {
        Ok(error) => {
            let mut notes = vec![format!("vCPU {}", site.vcpu)];
            notes.extend(site.gpa.map(|gpa| format!("gpa {gpa:#x}")));
            notes.extend(site.state.map(|state| format!("state {state}")));
            notes.push(format!("rip {:#x}", site.rip));
            notes.extend(site.symbol.as_ref().map(|symbol| format!("in {symbol}")));
            let error = noted(py, error, notes);
            match is_policy_error(py, &error) {
                true => at(py, error, site),
                false => error,
            }
        }
        Err(failure) => at(py, policy_error(py, format!("{site}: {failure}")), site),
    }
}

fn noted(py: Python<'_>, error: PyErr, notes: impl IntoIterator<Item = String>) -> PyErr {
    for note in notes {
        // An exception class can override add_note and fail; the exception itself matters more.
        let add = error.value(py).getattr("add_note");
        let _ = add.and_then(|add| call::call(&add, PyString::new(py, &note).as_any()));
    }
    error
}

/// Whether it is the PolicyError that the binding raises, and not the hook's own exception.
pub(crate) fn is_policy_error(py: Python<'_>, error: &PyErr) -> bool {
    is_a(py, error, "PolicyError")
}

fn is_a(py: Python<'_>, error: &PyErr, name: &str) -> bool {
    let class = py.import(MODULE).and_then(|errors| errors.getattr(name));
    class.is_ok_and(|class| error.matches(py, class).unwrap_or_default())
}

fn downcast(failure: Failure) -> Result<PyErr, Failure> {
    failure.downcast::<PyErr>().map(|error| *error)
}

fn at(py: Python<'_>, error: PyErr, site: &Site) -> PyErr {
    set(py, &error, "vcpu", site.vcpu);
    set(py, &error, "gpa", site.gpa);
    set(py, &error, "state", site.state);
    set(py, &error, "rip", site.rip);
    set(py, &error, "symbol", site.symbol.as_deref());
    error
}

fn set<'py>(py: Python<'py>, error: &PyErr, name: &str, value: impl IntoPyObject<'py>) {
    // The classes are defined in pagegate.errors and take any attribute.
    let _ = error.value(py).setattr(name, value);
}

/// The exception for a file that could not be read.
pub(crate) fn of_input(py: Python<'_>, error: InputError, path: &std::path::Path) -> PyErr {
    match error {
        InputError::System(error) => of_file(&error, path),
        InputError::Interrupted(failure) => raise(py, Error::Interrupted(failure)),
        InputError::TooLarge(most) => {
            PyValueError::new_err(format!("{}: it has more than {most} bytes, or no end", path.display()))
        }
        InputError::Device => PyValueError::new_err(format!(
            "{}: it is a character device, which need not have an end",
            path.display()
        )),
    }
}

/// The OSError that Python's own functions would raise, such as FileNotFoundError, with the path.
pub(crate) fn of_file(error: &std::io::Error, path: &std::path::Path) -> PyErr {
    match error.raw_os_error() {
        Some(errno) => {
            let text = error.to_string();
            let text = text.split(" (os error").next().unwrap_or_default().to_owned();
            PyOSError::new_err((errno, text, path.as_os_str().to_os_string()))
        }
        None => PyOSError::new_err(error.to_string()),
    }
}
