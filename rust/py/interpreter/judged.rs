//! The request that a hook of this thread is being called with: only while that lasts can it be asked about its vCPU.

use std::cell::Cell;
use std::ptr;

use pyo3::ffi::PyObject;
use pyo3::prelude::*;

thread_local! {
    /// Only compared, never used as an address.
    static JUDGED: Cell<*const PyObject> = const { Cell::new(ptr::null()) };
}

/// Restores the request of the hook around this one, if any, when it is dropped.
pub(crate) struct Judging(*const PyObject);

/// Says that a hook is called with `request`, until the guard is dropped.
pub(crate) fn judging<T>(request: &Bound<'_, T>) -> Judging {
    Judging(JUDGED.replace(request.as_ptr()))
}

/// Whether a hook of this thread is being called with `request`.
pub(crate) fn is<T>(request: &Bound<'_, T>) -> bool {
    ptr::eq(JUDGED.get(), request.as_ptr())
}

impl Drop for Judging {
    fn drop(&mut self) {
        JUDGED.set(self.0);
    }
}
