//! Numbers of bytes and addresses from Python: an int, or text such as "64M".

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyRange, PyString};

use super::arguments::{Integer, Named, integer, integer_named, out_of_range};
use super::call;

const FORM: &str = "whole number, such as 64, 0x40, 64K, 64M or 1G";

/// A whole number as text, which may end in a unit: 64, 0x40, 64K, 2MiB, 1G. ValueError for anything else.
#[pyfunction]
pub(crate) fn whole_number<'py>(text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyAny>> {
    match parse(text)? {
        Some(number) => Ok(number),
        None => Err(PyValueError::new_err(format!("{} is no {FORM}", call::repr(text)?))),
    }
}

/// An argument that is a number of bytes or an address, for which text with a unit does, too.
///
/// ``name``: what messages call it. TypeError for what is neither an int nor text, ValueError for other text and for
/// what is negative or above 64 bits.
#[pyfunction]
pub(crate) fn number_of_bytes(value: &Bound<'_, PyAny>, name: &str) -> PyResult<u64> {
    size_named(value, name, "4096, or text such as 4K")
}

/// A number of bytes or an address with this name, for `from_py_with`.
pub(crate) fn size<N: Named, T: Integer>(value: &Bound<'_, PyAny>) -> PyResult<T> {
    match value.cast::<PyString>() {
        Ok(text) => size_from_text(text, N::NAME, N::ALLOWED),
        Err(_) => integer::<N, T>(value),
    }
}

/// As [`size`], or None.
pub(crate) fn optional<N: Named>(value: &Bound<'_, PyAny>) -> PyResult<Option<u64>> {
    match value.is_none() {
        true => Ok(None),
        false => size::<N, u64>(value).map(Some),
    }
}

/// A list of ranges of addresses, each `(gpa, size)`, text, "GPA+SIZE", or a `range`; or one `range`.
pub(crate) fn ranges(value: &Bound<'_, PyAny>) -> PyResult<Vec<(u64, u64)>> {
    let form = || -> PyResult<PyErr> {
        Ok(PyTypeError::new_err(format!(
            "ranges is {}: it must be a range of addresses, such as range(0x100_0000, 0x101_0000), or a list of such ranges, of \
             (gpa, size), such as [(0x100_0000, 64 << 10)], or of text, such as [\"16M+64K\"]",
            call::repr(value)?
        )))
    };
    // Not as a list, which it would be of each of its addresses.
    let items = match value.is_instance_of::<PyRange>() {
        true => vec![value.clone()],
        false => match items(value)? {
            Some(items) => items,
            None => return Err(form()?),
        },
    };
    let mut pairs = Vec::new();
    for item in items {
        if let Ok(range) = item.cast::<PyRange>() {
            pairs.push(of_range(range)?);
            continue;
        }
        let (gpa, size) = match item.cast::<PyString>() {
            Ok(text) => {
                let text = text.to_str()?;
                let Some((gpa, size)) = text.split_once('+') else {
                    return Err(form()?);
                };
                let text = |part: &str| PyString::new(value.py(), part).into_any();
                (text(gpa), text(size))
            }
            Err(_) => match item.extract() {
                Ok(pair) => pair,
                Err(_) => return Err(form()?),
            },
        };
        let number = |number, part| size_named(number, part, "0x100_0000, or text such as 16M");
        pairs.push((number(&gpa, "a gpa in ranges")?, number(&size, "a size in ranges")?));
    }
    Ok(pairs)
}

/// The address and the size of a Python `range` of addresses.
fn of_range(range: &Bound<'_, PyRange>) -> PyResult<(u64, u64)> {
    let wrong = |why: &str| PyValueError::new_err(format!("ranges has {range}: {why}"));
    if !range.getattr("step")?.eq(1)? {
        return Err(wrong("its step must be 1, so that it has every address"));
    }
    let end = |name: &str| range.getattr(name)?.extract::<u64>();
    let (Ok(start), Ok(stop)) = (end("start"), end("stop")) else {
        return Err(wrong("its addresses must be between 0 and 18446744073709551615"));
    };
    let size = stop.checked_sub(start).filter(|size| *size > 0);
    size.map(|size| (start, size)).ok_or_else(|| wrong("it is empty"))
}

/// What a list or another sequence holds; `None` for what is none, or is text.
fn items<'py>(value: &Bound<'py, PyAny>) -> PyResult<Option<Vec<Bound<'py, PyAny>>>> {
    match value.extract() {
        Ok(items) => Ok(Some(items)),
        Err(error) if error.is_instance_of::<PyTypeError>(value.py()) => {
            call::forget(value.py(), error);
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn size_named(value: &Bound<'_, PyAny>, name: &str, such_as: &str) -> PyResult<u64> {
    match value.cast::<PyString>() {
        Ok(text) => size_from_text(text, name, ""),
        Err(_) => integer_named(value, name, such_as, ""),
    }
}

fn size_from_text<T: Integer>(text: &Bound<'_, PyString>, name: &str, allowed: &str) -> PyResult<T> {
    match parse(text)? {
        Some(number) => match number.extract::<T>() {
            Ok(number) => Ok(number),
            Err(error) if error.is_instance_of::<PyOverflowError>(text.py()) => {
                Err(out_of_range::<T>(name, &call::repr(text)?, allowed))
            }
            Err(error) => Err(error),
        },
        None => Err(PyValueError::new_err(format!(
            "{name} is {}: it must be a {FORM}",
            call::repr(text)?
        ))),
    }
}

/// The one place where such text is read.
fn parse<'py>(text: &Bound<'py, PyString>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let lower = text.to_str()?.trim().to_ascii_lowercase();
    if !lower.is_ascii() {
        return Ok(None);
    }
    // No letter of a unit is a hexadecimal digit.
    let (digits, unit) = lower.split_at(lower.find(['k', 'm', 'g', 't']).unwrap_or(lower.len()));
    let shift = match (unit.chars().next(), unit.get(1..).unwrap_or_default()) {
        (None, _) => 0,
        (Some('k'), "" | "b" | "ib") => 10,
        (Some('m'), "" | "b" | "ib") => 20,
        (Some('g'), "" | "b" | "ib") => 30,
        (Some('t'), "" | "b" | "ib") => 40,
        _ => return Ok(None),
    };
    let py = text.py();
    match py.get_type::<PyInt>().call1((digits.trim_end(), 0)) {
        Ok(number) => number.lshift(shift).map(Some),
        Err(error) if error.is_instance_of::<PyValueError>(py) => Ok(None),
        Err(error) => Err(error),
    }
}
