//! Words for the core's values, both ways.

use pagegate_core::Mode;
use pagegate_core::attributes::State;
use pagegate_core::probe::VmType;
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
pub(crate) fn enforcement(word: &str) -> PyResult<Option<Mode>> {
    let modes = [Mode::Attributes, Mode::Memslots].map(|mode| (mode.as_str(), Some(mode)));
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

/// Numbers as arguments: what does not fit is a ValueError, as everywhere else, and not an OverflowError.
macro_rules! numbers {
    ($($name:ident, $optional:ident: $type:ty;)*) => {$(
        pub(crate) fn $name(value: &Bound<'_, PyAny>) -> PyResult<$type> {
            value.extract().map_err(|error: PyErr| out_of_range(value, error, &<$type>::MIN, &<$type>::MAX))
        }

        #[allow(dead_code, reason = "not every type is optional somewhere")]
        pub(crate) fn $optional(value: &Bound<'_, PyAny>) -> PyResult<Option<$type>> {
            if value.is_none() { Ok(None) } else { $name(value).map(Some) }
        }
    )*};
}

numbers! {
    u64, optional_u64: u64;
    u32, optional_u32: u32;
    u16, optional_u16: u16;
    usize, optional_usize: usize;
    i32, optional_i32: i32;
}

fn out_of_range(
    value: &Bound<'_, PyAny>,
    error: PyErr,
    least: &dyn std::fmt::Display,
    most: &dyn std::fmt::Display,
) -> PyErr {
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
