//! Reading the files that a guest is made of.

use std::path::Path;

use pagegate_core::input::Input;
use pyo3::prelude::*;

use crate::interpreter::{attach, errors};

/// The most bytes of an image, a kernel or an initrd. A device or a pipe may have no end.
const LARGEST: u64 = 1 << 30;

/// All bytes of a file, or of a pipe; Ctrl-C ends it.
pub(super) fn read(py: Python<'_>, path: &Path) -> PyResult<Vec<u8>> {
    let whole = || Input::open(path)?.whole(LARGEST, &mut attach::check_signals);
    py.detach(whole).map_err(|error| errors::of_input(py, error, path))
}
