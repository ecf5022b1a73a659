//! Calling hooks with the same object again and again, as long as they do not keep it.
//!
//! Making and freeing an object is a quarter of what asking a hook costs.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::thread::LocalKey;

use pyo3::PyClass;
use pyo3::prelude::*;

/// What a thread asks its next question of this class with.
pub(crate) type Spare<T> = Cell<Option<Py<T>>>;

/// What a core's question becomes for a hook.
pub(crate) trait HookArgument: PyClass<Frozen = pyo3::pyclass::boolean_struct::True> + Sync {
    /// What the core asks.
    type Question;

    fn make<'py>(py: Python<'py>, question: &Self::Question) -> PyResult<Bound<'py, Self>>;

    /// Makes the object, which nobody else knows, this question.
    fn set(&self, question: &Self::Question);

    fn spare() -> &'static LocalKey<Spare<Self>>;
}

/// Calls `hook` with a question.
pub(crate) fn call<'py, T: HookArgument>(
    hook: &Bound<'py, PyAny>,
    question: &T::Question,
) -> PyResult<Bound<'py, PyAny>> {
    let py = hook.py();
    let request = match T::spare().take() {
        Some(spare) => {
            spare.get().set(question);
            spare.into_bound(py)
        }
        None => T::make(py, question)?,
    };
    let answer = hook.call1((&request,));
    if is_unshared(&request) {
        T::spare().set(Some(request.unbind()));
    }
    answer
}

/// Frees what this thread kept.
pub(crate) fn forget<T: HookArgument>() {
    drop(T::spare().take());
}

/// Whether this is the only reference, as far as anybody but the garbage collector can tell.
fn is_unshared<T: PyClass>(request: &Bound<'_, T>) -> bool {
    // SAFETY: the object is alive, for `request` refers to it, and the thread is attached.
    let count = unsafe { pyo3::ffi::Py_REFCNT(request.as_ptr()) };
    count == 1
}
