//! What a run of a machine needs from the interpreter.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pagegate_core::error::Failure;
use pagegate_core::machine::config::ThreadWrapper;
use pagegate_core::machine::run::Ended;
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

/// Runs a machine and keeps its report, also that of a run that fails. The policy is told before and after. The run is
/// claimed before the policy is told, so that what ends a run is heeded meanwhile, and no other one begins.
pub(super) fn run(vm: &Bound<'_, PyAny>, parts: &Parts, timeout: Option<Duration>) -> PyResult<Py<PyReport>> {
    let py = vm.py();
    let machine = parts.machine(py)?;
    let claim = machine.claim_run(timeout).map_err(|error| errors::raise(py, error))?;
    let listed = ending::Listed::new(py, &machine)?;
    if let Err(error) = prepare(vm, parts) {
        keep(parts, None);
        return Err(error);
    }
    let Ended { report, error, over } = py.detach(|| claim.run(&mut || look(parts.overdue.as_deref())));
    let report = Py::new(py, PyReport::of(py, report)?)?;
    keep(parts, Some(report.clone_ref(py)));
    drop((over, listed));
    let told = match parts.hooks() {
        Some(hooks) => hooks.policy().tell(Moment::Done, report.bind(py)),
        None => Ok(()),
    };
    let Some(error) = error else {
        return told.map(|()| report);
    };
    let failure = errors::of_run(py, error, report.bind(py).as_any());
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

/// Tells the policy of the machine, and that a run begins.
fn prepare(vm: &Bound<'_, PyAny>, parts: &Parts) -> PyResult<()> {
    parts.configure(parts.hooks().as_ref(), vm)?;
    // Once more: `configure` may have put another one in place, which has been told of the machine by that.
    let hooks = parts.hooks();
    hooks.map_or(Ok(()), |hooks| hooks.policy().tell(Moment::Running, vm))
}

fn keep(parts: &Parts, report: Option<Py<PyReport>>) {
    // Two statements: the lock is released before the last report is dropped.
    let last = std::mem::replace(&mut *lock(&parts.report), report);
    drop(last);
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
