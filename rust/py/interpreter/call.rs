//! Running Python code that others wrote: hooks, handlers and listeners, and what is done with their answers.
//!
//! If the interpreter ends while that code has given it up, what is called here never returns: CPython up to 3.13 ends such a
//! thread with pthread_exit, which unwinds its stack, and no Rust code may run then. (PyO3 does the same where a thread
//! attaches; from 3.14 on CPython itself does it.)
#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::ops::Deref;

use pyo3::ffi::PyObject;
use pyo3::prelude::*;
use pyo3::types::PyString;

mod raw {
    use pyo3::ffi::PyObject;

    // PyO3 declares them as some that do not unwind.
    unsafe extern "C-unwind" {
        pub(super) fn PyObject_CallOneArg(callable: *mut PyObject, argument: *mut PyObject) -> *mut PyObject;
        pub(super) fn PyObject_CallNoArgs(callable: *mut PyObject) -> *mut PyObject;
        pub(super) fn PyObject_Repr(object: *mut PyObject) -> *mut PyObject;
        pub(super) fn PyNumber_Index(object: *mut PyObject) -> *mut PyObject;
        pub(super) fn PyFloat_AsDouble(object: *mut PyObject) -> f64;
        pub(super) fn Py_DecRef(object: *mut PyObject);
    }
}

/// Keeps the thread for ever when it is dropped by an unwinding that is not a panic's.
struct Returns;

impl Drop for Returns {
    fn drop(&mut self) {
        while !std::thread::panicking() {
            std::thread::park();
        }
    }
}

/// Runs `body`, which is one call into Python, or many: then those that can run the code of others should be the functions of
/// this module, because what lies between such a call and here is unwound.
#[inline]
pub(super) fn guarded<T>(body: impl FnOnce() -> T) -> T {
    let returns = Returns;
    let done = body();
    std::mem::forget(returns);
    done
}

/// A reference to an object whose finalizer may be anybody's, such as a hook's answer.
pub(crate) struct Owned<'py>(ManuallyDrop<Bound<'py, PyAny>>);

impl<'py> Deref for Owned<'py> {
    type Target = Bound<'py, PyAny>;

    fn deref(&self) -> &Bound<'py, PyAny> {
        &self.0
    }
}

impl<'py> From<Bound<'py, PyAny>> for Owned<'py> {
    fn from(object: Bound<'py, PyAny>) -> Self {
        Self(ManuallyDrop::new(object))
    }
}

impl Drop for Owned<'_> {
    #[inline]
    fn drop(&mut self) {
        let object = self.0.as_ptr();
        // SAFETY: the thread is attached, and the reference is this one's own, which nothing uses afterwards.
        guarded(|| unsafe { raw::Py_DecRef(object) });
    }
}

impl<'py> Owned<'py> {
    /// One more reference to an object. While it lasts, the others can be dropped without a guard.
    pub(crate) fn another(py: Python<'py>, object: &Py<PyAny>) -> Self {
        object.bind(py).clone().into()
    }

    /// What a call into Python returned.
    fn of(py: Python<'py>, object: *mut PyObject) -> PyResult<Self> {
        // SAFETY: it is a new reference, or null with an exception set.
        unsafe { Bound::from_owned_ptr_or_err(py, object) }.map(Self::from)
    }
}

/// Calls `callable` with one argument.
pub(crate) fn call<'py>(callable: &Bound<'py, PyAny>, argument: &Bound<'py, PyAny>) -> PyResult<Owned<'py>> {
    // SAFETY: the thread is attached, and both objects are alive until the call returns.
    let answer = guarded(|| unsafe { raw::PyObject_CallOneArg(callable.as_ptr(), argument.as_ptr()) });
    Owned::of(callable.py(), answer)
}

/// The same without an argument.
pub(crate) fn call_alone<'py>(callable: &Bound<'py, PyAny>) -> PyResult<Owned<'py>> {
    // SAFETY: the thread is attached, and the object is alive until the call returns.
    let answer = guarded(|| unsafe { raw::PyObject_CallNoArgs(callable.as_ptr()) });
    Owned::of(callable.py(), answer)
}

/// What `repr` says of an object, for messages.
pub(crate) fn repr(object: &Bound<'_, PyAny>) -> PyResult<String> {
    // SAFETY: the thread is attached, and the object is alive until the call returns.
    let text = guarded(|| unsafe { raw::PyObject_Repr(object.as_ptr()) });
    let text = Owned::of(object.py(), text)?;
    Ok(text.cast::<PyString>()?.to_string_lossy().into_owned())
}

/// The int that an object stands for, which its `__index__` says.
pub(crate) fn index<'py>(object: &Bound<'py, PyAny>) -> PyResult<Owned<'py>> {
    // SAFETY: the thread is attached, and the object is alive until the call returns.
    let index = guarded(|| unsafe { raw::PyNumber_Index(object.as_ptr()) });
    Owned::of(object.py(), index)
}

/// The number that an object stands for, which its `__float__` says.
pub(crate) fn float(object: &Bound<'_, PyAny>) -> PyResult<f64> {
    // SAFETY: the thread is attached, and the object is alive until the call returns.
    let number = guarded(|| unsafe { raw::PyFloat_AsDouble(object.as_ptr()) });
    // This may be an error, or may not.
    match number == -1.0 {
        true => PyErr::take(object.py()).map_or(Ok(number), Err),
        false => Ok(number),
    }
}

/// Drops an exception that is not passed on, and with it what its traceback refers to.
pub(crate) fn forget(py: Python<'_>, error: PyErr) {
    drop(Owned::from(error.into_value(py).into_bound(py).into_any()));
}
