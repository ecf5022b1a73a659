//! Reading the files that a guest is made of.

use std::path::{Path, PathBuf};

use pagegate_core::input::{Input, InputError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::interpreter::{attach, errors};

/// The most bytes of an image, a kernel or an initrd. A device or a pipe may have no end.
const LARGEST: u64 = 1 << 30;

/// The bytes of a regular file of at most ``most`` bytes; Ctrl-C ends the reading.
///
/// ``None`` for what is no regular file: a pipe's writer would be waited for. Raises OSError, and ValueError for a
/// larger one.
#[pyfunction]
#[pyo3(name = "_regular_file")]
pub(crate) fn regular_file(py: Python<'_>, path: PathBuf, most: u64) -> PyResult<Option<Bound<'_, PyBytes>>> {
    let whole = || match Input::open(&path)? {
        input if input.is_regular() => input.whole(most, &mut attach::check_signals).map(Some),
        _ => Ok(None),
    };
    match py.detach(whole) {
        Err(InputError::Device) => Ok(None),
        read => {
            let bytes = read.map_err(|error| errors::of_input(py, error, &path))?;
            Ok(bytes.map(|bytes| PyBytes::new(py, &bytes)))
        }
    }
}

/// All bytes of a file, or of a pipe; Ctrl-C ends it.
pub(super) fn read(py: Python<'_>, path: &Path) -> PyResult<Vec<u8>> {
    let whole = || Input::open(path)?.whole(LARGEST, &mut attach::check_signals);
    py.detach(whole).map_err(|error| errors::of_input(py, error, path))
}
