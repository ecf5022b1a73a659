//! Attaching vCPU threads to the interpreter, once for each hook.
//!
//! A thread keeps the thread state that it got when it began, so that a hook takes and releases the interpreter and
//! nothing else. `Python::attach` looks for the state each time, which costs half as much again, and more from 3.13 on.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;

thread_local! {
    /// This thread's state while it is detached; null if it has none, or is attached.
    static DETACHED: Cell<*mut ffi::PyThreadState> = const { Cell::new(ptr::null_mut()) };
}

/// Puts back on every way out.
struct Detached(*mut ffi::PyThreadState);

impl Drop for Detached {
    fn drop(&mut self) {
        DETACHED.set(self.0);
    }
}

/// Detaches on every way out.
struct Attached;

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: `attached` attached this thread, and whatever ran since left it so, as `Python` tokens require.
        let state = unsafe { ffi::PyEval_SaveThread() };
        DETACHED.set(state);
    }
}

/// Runs the body of a thread that attaches often, detached. What it kept is freed at the end.
pub(crate) fn thread(body: impl FnOnce() + Send, at_end: impl FnOnce(Python<'_>)) {
    Python::attach(|py| {
        // SAFETY: the thread is attached, as `py` says.
        let state = unsafe { ffi::PyThreadState_Get() } as usize;
        py.detach(move || {
            let _forgets = Detached(ptr::null_mut());
            DETACHED.set(state as *mut ffi::PyThreadState);
            body();
        });
        at_end(py);
    });
}

/// As `Python::attach`, on any thread.
pub(crate) fn attached<T>(body: impl FnOnce(Python<'_>) -> T) -> T {
    let state = DETACHED.replace(ptr::null_mut());
    if state.is_null() {
        return Python::attach(body);
    }
    // SAFETY: the state is this thread's own, alive until `thread` returns, and the thread is detached: only then it is
    // found there.
    unsafe { ffi::PyEval_RestoreThread(state) };
    let _attached = Attached;
    // SAFETY: the line above attached it, and it stays so until the guard drops, after `body`.
    body(unsafe { Python::assume_attached() })
}
