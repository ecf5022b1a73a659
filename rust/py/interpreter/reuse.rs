//! Calls hooks with one request object per thread, which is written anew for each call. If a hook kept a reference to it, the
//! next call makes a new one, and so does each call on a CPython without the GIL.
//!
//! Making and freeing the object is a quarter of what calling a hook costs.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::thread::LocalKey;

use pyo3::PyClass;
use pyo3::prelude::*;

use super::call::{self, Owned};
use super::judged;

/// The object that a thread reuses for its next call.
pub(crate) type Spare<T> = Cell<Option<Py<T>>>;

/// A class whose objects hooks are called with.
pub(crate) trait HookArgument: PyClass<Frozen = pyo3::pyclass::boolean_struct::True> + Sync {
    /// The core's type of the same.
    type Question;

    fn make<'py>(py: Python<'py>, question: &Self::Question) -> PyResult<Bound<'py, Self>>;

    /// Writes a question into the object, to which there is no other reference.
    fn set(&self, question: &Self::Question);

    fn spare() -> &'static LocalKey<Spare<Self>>;
}

/// Calls `hook` with a question.
pub(crate) fn call<'py, T: HookArgument>(hook: &Bound<'py, PyAny>, question: &T::Question) -> PyResult<Owned<'py>> {
    let py = hook.py();
    let request = match T::spare().take() {
        Some(spare) => {
            spare.get().set(question);
            spare.into_bound(py)
        }
        None => T::make(py, question)?,
    };
    let judging = judged::judging(&request);
    let answer = call::call(hook, request.as_any());
    drop(judging);
    if is_unshared(&request) {
        T::spare().set(Some(request.unbind()));
    }
    answer
}

/// Frees the object that this thread kept.
pub(crate) fn forget<T: HookArgument>() {
    drop(T::spare().take());
}

/// Whether this is the only reference. (`gc.get_objects` finds an object all the same.) Never where there is no GIL: another
/// thread's reference that is just being taken is not counted yet.
fn is_unshared<T: PyClass>(request: &Bound<'_, T>) -> bool {
    // SAFETY: the object is alive, for `request` refers to it, and the thread is attached.
    let count = unsafe { pyo3::ffi::Py_REFCNT(request.as_ptr()) };
    !cfg!(Py_GIL_DISABLED) && count == 1
}
