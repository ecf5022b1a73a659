//! Loading an image: bytes, or a file.

use pagegate_core::boot::image::Image;
use pagegate_core::machine::assembly::Machine;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::input;
use crate::interpreter::{arguments, attach, errors};

/// Loads bytes-like objects as they are, and a file by what it is. Returns the entry point.
pub(super) fn load(py: Python<'_>, machine: &Machine, image: &Bound<'_, PyAny>, at: u64) -> PyResult<u64> {
    let load = |image: &Image<'_>| {
        py.detach(|| machine.load(image, &mut attach::check_signals))
            .map_err(|error| errors::raise(py, error))
    };
    match arguments::bytes(image) {
        Ok(bytes) => return load(&Image::raw(&bytes, at)),
        Err(error) if error.is_instance_of::<PyTypeError>(py) => {}
        Err(error) => return Err(error),
    }
    let path = arguments::path(image, "image must be bytes-like, or the path of an ELF or raw file")?;
    let bytes = input::read(py, &path)?;
    match Image::is_elf(&bytes) {
        true => load(&Image::elf(&bytes).map_err(|error| errors::raise(py, error))?),
        false => load(&Image::raw(&bytes, at)),
    }
}
