//! What a run of a machine needs from the interpreter.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pagegate_core::error::Failure;
use pagegate_core::machine::config::ThreadWrapper;
use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;

use super::device_io::forget_accesses;
use super::parts::{Parts, lock};
use super::report::PyReport;
use crate::interpreter::overdue::Overdue;
use crate::interpreter::{attach, call, ending, errors};
use crate::policy::hooks::{Moment, forget_requests};

/// Gives a vCPU thread one Python thread state for its whole life, if it may call Python.
pub(super) fn around(enters_python: Arc<AtomicBool>, overdue: Option<Arc<Overdue>>) -> ThreadWrapper {
    Arc::new(move |body| match enters_python.load(Ordering::Relaxed) {
        true => attach::thread(overdue.as_deref(), body, |py| {
            forget_requests(py);
            forget_accesses(py);
        }),
        false => body(),
    })
}

/// Runs a machine and keeps its report, also that of a run that fails. The policy is told before and after.
pub(super) fn run(vm: &Bound<'_, PyAny>, parts: &Parts, timeout: Option<Duration>) -> PyResult<Py<PyReport>> {
    let py = vm.py();
    let machine = parts.machine(py)?;
    let hooks = parts.hooks();
    parts.configure(hooks.as_ref(), vm)?;
    if let Some(hooks) = &hooks {
        hooks.policy().tell(Moment::Running, vm)?;
    }
    let ended = ending::run(py, &machine, || {
        machine.run(timeout, &mut || look(parts.overdue.as_deref()))
    })?;
    let (report, error) = match ended {
        Ok(report) => (Some(report), None),
        Err(error) => (machine.take_failed_report(), Some(error)),
    };
    let report = report
        .map(|report| Py::new(py, PyReport::of(py, report)?))
        .transpose()?;
    let kept = report.as_ref().map(|report| report.clone_ref(py));
    // Two statements: the lock is released before it is dropped.
    let last = std::mem::replace(&mut *lock(&parts.report), kept);
    drop(last);
    let told = match (parts.hooks(), &report) {
        (Some(hooks), Some(report)) => hooks.policy().tell(Moment::Done, report.bind(py)),
        _ => Ok(()),
    };
    match (error, report) {
        (None, Some(report)) => told.map(|()| report),
        (None, None) => Err(errors::busy(py, "the run has no report")),
        (Some(error), _) => {
            let failure = errors::raise(py, error);
            match told {
                // Ctrl-C and sys.exit() are no failure of done(), and come first.
                Err(other) if !other.is_instance_of::<PyException>(py) => return Err(other),
                Err(other) => {
                    let note = format!("done() raised {} afterwards", other.get_type(py).name()?);
                    call::forget(py, other);
                    failure.value(py).call_method1("add_note", (note,))?;
                }
                Ok(()) => {}
            }
            Err(failure)
        }
    }
}

/// Bytes of stack for threads, if `threading.stack_size` was told how many.
pub(super) fn stack(py: Python<'_>) -> PyResult<Option<usize>> {
    let bytes: usize = py.import("threading")?.call_method0("stack_size")?.extract()?;
    Ok((bytes > 0).then_some(bytes))
}

/// What `run` does some forty times a second.
pub(super) fn look(overdue: Option<&Overdue>) -> Result<(), Failure> {
    attach::attached(|py| {
        py.check_signals()?;
        overdue.map_or(Ok(()), |overdue| overdue.look(py))
    })
}

/// The limit for a call of a hook.
pub(super) fn policy_timeout(seconds: Option<f64>) -> PyResult<Option<Arc<Overdue>>> {
    let Some(seconds) = seconds else {
        return Ok(None);
    };
    match Duration::try_from_secs_f64(seconds) {
        Ok(limit) if !limit.is_zero() => Ok(Some(Arc::new(Overdue::new(limit)))),
        _ => Err(PyValueError::new_err(format!(
            "policy_timeout is {seconds}: it must be a number of seconds above 0"
        ))),
    }
}
