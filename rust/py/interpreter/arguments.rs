//! Reading and checking arguments from Python.

use std::fmt::Display;

use pagegate_core::hypervisor::host::{EnforcementMode, VmType};
use pagegate_core::memory::address::State;
use pyo3::FromPyObject;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;

pub(crate) fn state(word: &str, what: &str) -> PyResult<State> {
    choose(
        word,
        what,
        [State::Shared, State::Private].map(|state| (state.as_str(), state)),
    )
}

/// `None` for "auto".
pub(crate) fn enforcement(word: &str) -> PyResult<Option<EnforcementMode>> {
    let modes = EnforcementMode::ALL.map(|mode| (mode.as_str(), Some(mode)));
    choose(word, "enforcement", modes.into_iter().chain([("auto", None)]))
}

/// `None` for "auto".
pub(crate) fn vm_type(word: &str) -> PyResult<Option<VmType>> {
    let types = VmType::ALL.map(|kind| (kind.as_str(), Some(kind)));
    choose(word, "vm_type", types.into_iter().chain([("auto", None)]))
}

pub(crate) fn choose<T>(word: &str, what: &str, choices: impl IntoIterator<Item = (&'static str, T)>) -> PyResult<T> {
    let mut known = Vec::new();
    for (name, value) in choices {
        if name == word {
            return Ok(value);
        }
        known.push(format!("{name:?}"));
    }
    let known = known.join(", ");
    Err(PyValueError::new_err(format!(
        "{what} is {word:?}: it must be one of {known}"
    )))
}

/// An integer argument. One that does not fit raises ValueError, as other bad values do, and not OverflowError.
pub(crate) trait Integer: for<'a, 'py> FromPyObject<'a, 'py, Error = PyErr> + Display {
    const MIN: Self;
    const MAX: Self;
}

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl Integer for $type {
            const MIN: Self = <$type>::MIN;
            const MAX: Self = <$type>::MAX;
        }
    )*};
}

integers!(u64, u32, u16, usize, i32);

/// For `from_py_with`.
pub(crate) fn integer<T: Integer>(value: &Bound<'_, PyAny>) -> PyResult<T> {
    value
        .extract()
        .map_err(|error: PyErr| out_of_range(value, error, &T::MIN, &T::MAX))
}

/// As [`integer`], or None.
pub(crate) fn optional<T: Integer>(value: &Bound<'_, PyAny>) -> PyResult<Option<T>> {
    match value.is_none() {
        true => Ok(None),
        false => integer(value).map(Some),
    }
}

fn out_of_range(value: &Bound<'_, PyAny>, error: PyErr, least: &dyn Display, most: &dyn Display) -> PyErr {
    match error.is_instance_of::<PyOverflowError>(value.py()) {
        true => PyValueError::new_err(format!(
            "{value} is out of range: it must be between {least} and {most}"
        )),
        false => error,
    }
}

/// The bytes of any bytes-like object.
pub(crate) fn bytes(value: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    PyBuffer::<u8>::get(value)?.to_vec(value.py())
}
