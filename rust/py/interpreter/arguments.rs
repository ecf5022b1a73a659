//! Reading and checking arguments from Python.

use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

use pagegate_core::hypervisor::host::{EnforcementMode, VmType};
use pagegate_core::machine::config::{Confidential, Platform};
use pagegate_core::memory::address::State;
use pyo3::FromPyObject;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyMemoryError, PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyString};

use super::call;

pub(crate) fn state(word: &str, what: &str) -> PyResult<State> {
    choose(
        word,
        what,
        [State::Shared, State::Private].map(|state| (state.as_str(), state)),
    )
}

/// `None` for "auto".
pub(crate) fn enforcement(value: &Bound<'_, PyAny>) -> PyResult<Option<EnforcementMode>> {
    let modes = EnforcementMode::ALL.map(|mode| (mode.as_str(), Some(mode)));
    choose(
        &text::<named::enforcement>(value)?,
        "enforcement",
        modes.into_iter().chain([("auto", None)]),
    )
}

pub(crate) fn platform(value: &Bound<'_, PyAny>) -> PyResult<Platform> {
    choose(
        &text::<named::platform>(value)?,
        "platform",
        [("bare", Platform::Bare), ("pc", Platform::Pc)],
    )
}

/// `None` for an ordinary guest.
pub(crate) fn confidential(value: &Bound<'_, PyAny>) -> PyResult<Option<Confidential>> {
    let kinds = [("sev", Confidential::Sev)];
    let word = optional_text::<named::confidential>(value)?;
    word.map(|word| choose(&word, "confidential", kinds)).transpose()
}

/// `None` for "auto".
pub(crate) fn vm_type(value: &Bound<'_, PyAny>) -> PyResult<Option<VmType>> {
    let types = VmType::ALL.map(|kind| (kind.as_str(), Some(kind)));
    choose(
        &text::<named::vm_type>(value)?,
        "vm_type",
        types.into_iter().chain([("auto", None)]),
    )
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

integers!(u64, u32, u16, u8, usize, i64, i32);

/// A word to choose by; what is no text is written as Python writes it, and is none of the choices.
pub(crate) fn word(value: &Bound<'_, PyAny>) -> PyResult<String> {
    match value.extract::<String>() {
        Ok(word) => Ok(word),
        Err(_) => call::repr(value),
    }
}

/// The name of an argument, for the messages about it.
pub(crate) trait Named {
    const NAME: &'static str;
    /// How a good one is written; empty where an int says it all.
    const SUCH_AS: &'static str;
    /// Which numbers are allowed, for "it must be ..."; empty where all are that its type has.
    const ALLOWED: &'static str = "";
}

macro_rules! named {
    ($($name:ident $such_as:literal $($allowed:literal)?),* $(,)?) => {
        /// A type for each argument: `from_py_with` takes a function that is given the value only.
        #[expect(non_camel_case_types, reason = "each has the name of its argument")]
        pub(crate) mod named {
            $(
                pub(crate) struct $name;

                impl super::Named for $name {
                    const NAME: &'static str = stringify!($name);
                    const SUCH_AS: &'static str = $such_as;
                    const ALLOWED: &'static str = concat!($($allowed)?);
                }
            )*
        }
    };
}

named! {
    after "",
    append "",
    at "0x1000, or text such as 1M",
    attributes "",
    block "",
    burst "",
    call "",
    cid "",
    confidential "",
    count "",
    cr2 "",
    create "",
    cycles "",
    data "",
    debug_private "",
    discard "",
    enforcement "",
    errno "errno.EINVAL",
    events "",
    executed "",
    flags "",
    forever "",
    gpa "0x10_0000, or text such as 1M",
    half_done "",
    head "",
    hypervisor "",
    index "",
    initial "",
    initrd "",
    instruction "",
    interval "",
    keep "",
    kernel "",
    limit "",
    log_accesses "",
    mac "52:54:00:12:34:56",
    marks "",
    max "",
    max_shared "8 << 20, or text such as 8M",
    memory "64 << 20, or text such as 64M" "a multiple of 4096, from 4096 to 1 << 52 (4 PiB)",
    memslots "",
    n "4096, or text such as 4K",
    name "",
    nr "",
    offset "",
    p50 "",
    p90 "",
    p99 "",
    page_size "4096, or text such as 4K",
    pages "",
    path "",
    per_second "",
    platform "",
    policy_timeout "",
    port "0x3f8",
    prefault "",
    private "",
    private_memory "",
    private_bit "" "above all of memory, and below 52",
    raw "",
    read_only "",
    reason "",
    region "",
    remember "",
    repeats "",
    requests "",
    rip "",
    seconds "",
    seed "",
    sequence "",
    shared_bit "" "above all of memory, and below 52",
    since "",
    size "4096, or text such as 4K",
    state "",
    suberror "",
    symbol "",
    time "",
    to "",
    uses "",
    vcpu "",
    vcpus "",
    vm_type "",
    window "",
    write "",
    written "",
}

/// The `memory` of page states without a machine: a trial of a policy, and a trace.
pub(crate) struct StatesOnly;

impl Named for StatesOnly {
    const NAME: &'static str = "memory";
    const SUCH_AS: &'static str = named::memory::SUCH_AS;
    const ALLOWED: &'static str = "a multiple of 4096, from 4096 to 16 << 40 (16 TiB)";
}

/// An integer argument with this name, for `from_py_with`.
pub(crate) fn integer<N: Named, T: Integer>(value: &Bound<'_, PyAny>) -> PyResult<T> {
    integer_named(value, N::NAME, N::SUCH_AS, N::ALLOWED)
}

/// As [`integer`], or None.
pub(crate) fn optional<N: Named, T: Integer>(value: &Bound<'_, PyAny>) -> PyResult<Option<T>> {
    match value.is_none() {
        true => Ok(None),
        false => integer::<N, T>(value).map(Some),
    }
}

/// An integer with a name that is known when it is read.
pub(crate) fn integer_named<T: Integer>(
    value: &Bound<'_, PyAny>,
    name: &str,
    such_as: &str,
    allowed: &str,
) -> PyResult<T> {
    let extracted = match value.is_exact_instance_of::<PyInt>() {
        true => value.extract(),
        false => match call::index(value) {
            Ok(index) => index.extract(),
            // What an object's own `__index__` raises is passed on.
            Err(error) if value.get_type().hasattr("__index__")? => Err(error),
            Err(error) => {
                call::forget(value.py(), error);
                let such_as = match such_as.is_empty() {
                    true => String::new(),
                    false => format!(", such as {such_as}"),
                };
                let value = call::repr(value)?;
                return Err(PyTypeError::new_err(format!(
                    "{name} is {value}: it must be an int{such_as}"
                )));
            }
        },
    };
    extracted.map_err(
        |error: PyErr| match error.is_instance_of::<PyOverflowError>(value.py()) {
            true => out_of_range::<T>(name, &value.to_string(), allowed),
            false => error,
        },
    )
}

/// The ValueError for a number that its type does not have.
pub(super) fn out_of_range<T: Integer>(name: &str, value: &str, allowed: &str) -> PyErr {
    let allowed = match allowed.is_empty() {
        true => format!("between {} and {}", T::MIN, T::MAX),
        false => allowed.to_owned(),
    };
    PyValueError::new_err(format!(
        "{name} is {value}, which is out of range: it must be {allowed}"
    ))
}

/// The seconds of a ``timeout`` argument, infinity for ``None``.
///
/// ValueError if they are negative or no number of seconds.
#[pyfunction]
pub(crate) fn timeout_seconds(timeout: &Bound<'_, PyAny>) -> PyResult<f64> {
    if timeout.is_none() {
        return Ok(f64::INFINITY);
    }
    let seconds = match call::float(timeout) {
        Ok(seconds) => seconds,
        // An int that no float is as large as.
        Err(error) if error.is_instance_of::<PyOverflowError>(timeout.py()) => f64::NAN,
        Err(error)
            if error.is_instance_of::<PyTypeError>(timeout.py()) && !timeout.get_type().hasattr("__float__")? =>
        {
            call::forget(timeout.py(), error);
            return Err(PyTypeError::new_err(format!(
                "timeout is {}: it must be a number of seconds, such as 5.0, or None",
                call::repr(timeout)?
            )));
        }
        Err(error) => return Err(error),
    };
    match seconds >= 0.0 {
        true => Ok(seconds),
        false => Err(PyValueError::new_err(format!(
            "timeout is {timeout}: it must be a number of seconds, not negative"
        ))),
    }
}

/// A `timeout` argument, for `from_py_with`. `None` for no limit, and for one that is too long for a `Duration`.
pub(crate) fn timeout(value: &Bound<'_, PyAny>) -> PyResult<Option<Duration>> {
    Ok(Duration::try_from_secs_f64(timeout_seconds(value)?).ok())
}

/// An argument of text with this name, for `from_py_with`.
pub(crate) fn text<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<String> {
    extract::<N, String>(value, "text")
}

/// As [`text`], or None.
pub(crate) fn optional_text<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<Option<String>> {
    extract::<N, Option<String>>(value, "text, or None")
}

/// An argument that is True or False.
pub(crate) fn flag<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<bool> {
    extract::<N, bool>(value, "True or False")
}

/// The state of a page, as an argument with this name.
pub(crate) fn state_named<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<State> {
    match value.cast::<PyString>() {
        Ok(word) => state(word.to_str()?, N::NAME),
        Err(_) => Err(wrong::<N>(value, "\"private\" or \"shared\"")?),
    }
}

/// As [`state_named`], or None.
pub(crate) fn optional_state<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<Option<State>> {
    match value.is_none() {
        true => Ok(None),
        false => state_named::<N>(value).map(Some),
    }
}

/// A real number. What an object's own `__float__` raises is passed on.
pub(crate) fn real<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<f64> {
    match call::float(value) {
        // An int that no float is as large as.
        Err(error) if error.is_instance_of::<PyOverflowError>(value.py()) => {
            call::forget(value.py(), error);
            Ok(f64::INFINITY)
        }
        Err(error) if error.is_instance_of::<PyTypeError>(value.py()) && !value.get_type().hasattr("__float__")? => {
            call::forget(value.py(), error);
            Err(wrong::<N>(value, "a number")?)
        }
        number => number,
    }
}

/// As [`real`], or None.
pub(crate) fn optional_real<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<Option<f64>> {
    match value.is_none() {
        true => Ok(None),
        false => real::<N>(value).map(Some),
    }
}

/// A path, as an argument with this name.
pub(crate) fn path_named<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<PathBuf> {
    match value.extract() {
        Err(_) if !value.get_type().hasattr("__fspath__")? => Err(wrong::<N>(value, "a path")?),
        path => path,
    }
}

/// As [`path_named`], or None.
pub(crate) fn optional_path<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<Option<PathBuf>> {
    match value.is_none() {
        true => Ok(None),
        false => path_named::<N>(value).map(Some),
    }
}

/// An argument of a type that runs no code of others when it is read.
pub(crate) fn extract<N: Named, T>(value: &Bound<'_, PyAny>, must_be: &str) -> PyResult<T>
where
    T: for<'a, 'py> FromPyObject<'a, 'py>,
{
    match value.extract() {
        Ok(extracted) => Ok(extracted),
        Err(_) => Err(wrong::<N>(value, must_be)?),
    }
}

/// The TypeError for an argument of a wrong type.
fn wrong<N: Named>(value: &Bound<'_, PyAny>, must_be: &str) -> PyResult<PyErr> {
    let such_as = match N::SUCH_AS.is_empty() {
        true => String::new(),
        false => format!(", such as {}", N::SUCH_AS),
    };
    let (name, value) = (N::NAME, call::repr(value)?);
    Ok(PyTypeError::new_err(format!(
        "{name} is {value}: it must be {must_be}{such_as}"
    )))
}

/// A path. TypeError with this text for what is none; what its `__fspath__` raises stays what it is.
pub(crate) fn path(value: &Bound<'_, PyAny>, otherwise: &'static str) -> PyResult<PathBuf> {
    value
        .extract()
        .map_err(|error: PyErr| match error.is_instance_of::<PyTypeError>(value.py()) {
            true => PyTypeError::new_err(otherwise),
            false => error,
        })
}

/// The bytes of a bytes-like object, as an argument with this name.
pub(crate) fn bytes_named<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    match bytes(value) {
        Err(error) if error.is_instance_of::<PyTypeError>(value.py()) && !value.get_type().hasattr("__buffer__")? => {
            Err(wrong::<N>(value, "bytes, or what has the buffer protocol")?)
        }
        bytes => bytes,
    }
}

/// Bytes, or a sequence of integers that are one byte each.
pub(crate) fn byte_values<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    extract::<N, Vec<u8>>(value, "bytes, or integers from 0 to 255")
}

/// The bytes of any bytes-like object.
pub(crate) fn bytes(value: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    let buffer = PyBuffer::<u8>::get(value)?;
    let mut bytes = Vec::new();
    let size = buffer.item_count();
    bytes.try_reserve_exact(size).map_err(|_| PyMemoryError::new_err(()))?;
    bytes.resize(size, 0);
    buffer.copy_to_slice(value.py(), &mut bytes)?;
    Ok(bytes)
}
