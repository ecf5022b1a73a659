//! Attaching vCPU threads to the interpreter, once for each hook.
//!
//! A vCPU thread keeps one Python thread state for its whole life, so that calling a hook only takes and releases the
//! interpreter. `Python::attach` looks the state up each time, which takes half as long again, and more from 3.13 on.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ptr;

use pagegate_core::error::Failure;
use pyo3::ffi;
use pyo3::prelude::*;

use super::overdue::{self, Overdue};
use super::{call, errors};

thread_local! {
    /// This thread's state while it is detached; null if it has none, or is attached.
    static DETACHED: Cell<*mut ffi::PyThreadState> = const { Cell::new(ptr::null_mut()) };
}

/// Sets [`DETACHED`] to this when dropped.
struct Detached(*mut ffi::PyThreadState);

impl Drop for Detached {
    fn drop(&mut self) {
        DETACHED.set(self.0);
    }
}

/// Detaches the thread when dropped.
struct Attached;

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: `attached` attached this thread, and it still is: code that holds a `Python` token may not detach it.
        let state = unsafe { ffi::PyEval_SaveThread() };
        DETACHED.set(state);
    }
}

/// Runs `body` detached, on a thread that attaches often. Its calls are watched, if they have a limit. `at_end` runs attached,
/// to free what the thread kept. After the interpreter has ended neither runs.
pub(crate) fn thread(overdue: Option<&Overdue>, body: impl FnOnce() + Send, at_end: impl FnOnce(Python<'_>)) {
    let attached = |py: Python<'_>| {
        trace_as_python_does(py);
        let watched = overdue.map(|overdue| overdue.watch(py)).transpose();
        let _watched = watched.unwrap_or_else(|error| {
            error.write_unraisable(py, None);
            None
        });
        // SAFETY: the thread is attached: there is a `py`.
        let state = unsafe { ffi::PyThreadState_Get() } as usize;
        py.detach(move || {
            let _forgets = Detached(ptr::null_mut());
            DETACHED.set(state as *mut ffi::PyThreadState);
            body();
        });
        at_end(py);
    };
    Python::try_attach(|py| call::guarded(|| attached(py)));
}

/// Installs what `threading.settrace` and `threading.setprofile` were given, as threads that Python starts do it:
/// debuggers and coverage use them.
fn trace_as_python_does(py: Python<'_>) {
    let install = |get: &str, set: &str| -> PyResult<()> {
        let function = py.import("threading")?.call_method0(get)?;
        if !function.is_none() {
            py.import("sys")?.call_method1(set, (function,))?;
        }
        Ok(())
    };
    for (get, set) in [("gettrace", "settrace"), ("getprofile", "setprofile")] {
        if let Err(error) = install(get, set) {
            error.write_unraisable(py, None);
        }
    }
}

/// As `Python::attach`, on any thread. A failure after the interpreter has ended.
pub(crate) fn attached<T>(body: impl FnOnce(Python<'_>) -> PyResult<T>) -> Result<T, Failure> {
    let state = DETACHED.replace(ptr::null_mut());
    if state.is_null() {
        let answer = Python::try_attach(|py| call::guarded(|| body(py))).ok_or("the interpreter has ended")?;
        return answer.map_err(errors::failure);
    }
    // SAFETY: the state is this thread's own and lives until `thread` returns, and the thread is detached: `DETACHED` is
    // null while it is attached.
    unsafe { ffi::PyEval_RestoreThread(state) };
    let _attached = Attached;
    // SAFETY: PyEval_RestoreThread attached the thread, which stays so until the guard is dropped, after `body`.
    let py = unsafe { Python::assume_attached() };
    // All of `body` counts: what it does with a hook's answer, too, and that the answer is dropped.
    let _watched = overdue::call(py);
    call::guarded(|| body(py)).map_err(errors::failure)
}

/// For what may take long, without the interpreter: whether Ctrl-C was pressed.
pub(crate) fn check_signals() -> Result<(), Failure> {
    attached(|py| py.check_signals())
}
