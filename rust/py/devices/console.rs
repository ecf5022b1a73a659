//! The guest's consoles.

use std::sync::Arc;
use std::time::Duration;

use pagegate_core::devices::console::{Console, Reader};
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::interpreter::{arguments, sizes};

/// The other end of the guest's serial port or virtio console: ``pagegate.console.Console`` reads and writes it.
#[pyclass(name = "ConsolePort", module = "pagegate._core", frozen)]
pub(crate) struct PyConsolePort {
    console: Arc<Console>,
    reader: Mutex<Reader>,
}

impl PyConsolePort {
    pub(crate) fn new(console: &Arc<Console>) -> Self {
        Self {
            console: console.clone(),
            reader: Mutex::new(console.reader()),
        }
    }
}

#[pymethods]
impl PyConsolePort {
    fn __repr__(&self) -> &'static str {
        "<pagegate.ConsolePort: the other end of a console of the guest>"
    }

    /// Takes up to ``n`` bytes that the guest wrote; how many before them were dropped; whether no more can come.
    ///
    /// Waits up to ``seconds`` for the first one. No more can come once the machine is closed.
    fn read<'py>(&self, py: Python<'py>, n: usize, seconds: f64) -> PyResult<(Bound<'py, PyBytes>, u64, bool)> {
        let wait = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX);
        let chunk = py.detach(|| self.reader.lock().read(n, wait));
        Ok((copied(py, &chunk.bytes)?, chunk.lost, chunk.ended))
    }

    /// Gives the guest bytes to read, and returns how many were taken: at most 64 KiB wait to be read.
    fn write(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::bytes_named::<arguments::named::data>)] data: Vec<u8>,
    ) -> usize {
        py.detach(|| self.console.write(&data))
    }

    /// The last ``n`` bytes that the guest wrote, read or not.
    fn tail<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = sizes::size::<arguments::named::size, _>)] n: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        copied(py, &self.console.tail(n))
    }
}

/// The bytes as Python's, or MemoryError.
fn copied<'py>(py: Python<'py>, bytes: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    PyBytes::new_with(py, bytes.len(), |into| {
        into.copy_from_slice(bytes);
        Ok(())
    })
}
