//! Attaching vCPU threads to the interpreter, once for each hook.
//!
//! A vCPU thread keeps one Python thread state for its whole life, so that calling a hook only takes and releases the
//! interpreter. `Python::attach` looks the state up each time, which takes half as long again, and more from 3.13 on.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ptr;

use pyo3::ffi;
use pyo3::prelude::*;

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

/// Runs `body` detached, on a thread that attaches often. `at_end` runs attached, to free what the thread kept.
pub(crate) fn thread(body: impl FnOnce() + Send, at_end: impl FnOnce(Python<'_>)) {
    Python::attach(|py| {
        // SAFETY: the thread is attached: there is a `py`.
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
    // SAFETY: the state is this thread's own and lives until `thread` returns, and the thread is detached: `DETACHED` is
    // null while it is attached.
    unsafe { ffi::PyEval_RestoreThread(state) };
    let _attached = Attached;
    // SAFETY: PyEval_RestoreThread attached the thread, which stays so until the guard is dropped, after `body`.
    body(unsafe { Python::assume_attached() })
}
