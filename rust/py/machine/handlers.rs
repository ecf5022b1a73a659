//! Setting the handlers of ports and of addresses.

use pyo3::prelude::*;

use super::device_io::Handler;
use super::marks::PyMarks;
use super::parts::Parts;
use crate::interpreter::errors;

/// Sets a port's handler.
pub(super) fn on_io(py: Python<'_>, parts: &Parts, port: u16, handler: Bound<'_, PyAny>) -> PyResult<()> {
    let machine = parts.machine(py)?;
    if let Ok(marks) = handler.cast::<PyMarks>() {
        let added = machine.on_io(port, marks.get().0.clone());
        return added.map_err(|error| errors::raise(py, error));
    }
    let handler = Handler::of(handler)?;
    let added = machine.on_io(port, handler.clone());
    added.map_err(|error| errors::raise(py, error))?;
    parts.keep(&handler);
    Ok(())
}

/// Sets the handler of a range of addresses.
pub(super) fn on_mmio(py: Python<'_>, parts: &Parts, gpa: u64, size: u64, handler: Bound<'_, PyAny>) -> PyResult<()> {
    let handler = Handler::of(handler)?;
    let added = parts.machine(py)?.on_mmio(gpa, size, handler.clone());
    added.map_err(|error| errors::raise(py, error))?;
    parts.keep(&handler);
    Ok(())
}
