//! Writing a machine's events to a file while it runs.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pagegate_core::trace::about::About;
use pagegate_core::trace::recorder::{Recorded, Recorder};
use pyo3::prelude::*;

use super::recorded::failed;
use crate::interpreter::arguments;
use crate::machine::vm::PyVm;

/// Writes a machine's events to a file while it runs, from now on, in a thread of its own.
///
/// ``path`` ends in .parquet, .arrow (IPC file) or .arrows (IPC stream); the file is created, or overwritten. The first
/// two can be read once the recorder is closed, the last at any time. No vCPU waits for it: events that the log dropped
/// before they were written are counted as lost, and so are those above ``limit``, which bounds the file. If the file
/// cannot be written, the run in progress ends as "stopped" and ``close`` raises the error.
///
/// Raises OSError, and ValueError for another name.
#[pyclass(name = "Recorder", module = "pagegate.trace", frozen)]
pub(crate) struct PyRecorder {
    recorder: Mutex<Option<Recorder>>,
    recorded: Mutex<Recorded>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[pymethods]
impl PyRecorder {
    #[new]
    #[pyo3(signature = (vm, path, *, limit = None))]
    fn new(
        py: Python<'_>,
        vm: &Bound<'_, PyVm>,
        path: PathBuf,
        #[pyo3(from_py_with = arguments::optional)] limit: Option<u64>,
    ) -> PyResult<Self> {
        let machine = vm.get().0.machine(py)?;
        let start = || {
            let about = About::now(machine.events(), machine.memory());
            let running = Arc::downgrade(&machine);
            // Requests from now on would not be recorded.
            let failed = move || {
                if let Some(machine) = running.upgrade() {
                    machine.stop();
                }
            };
            Recorder::start(
                machine.events().clone(),
                &about,
                &path,
                limit.unwrap_or(u64::MAX),
                failed,
            )
        };
        let recorder = py.detach(start).map_err(failed)?;
        Ok(Self {
            recorder: Mutex::new(Some(recorder)),
            recorded: Mutex::default(),
        })
    }

    /// Events that are in the file; 0 until it is closed.
    #[getter]
    fn written(&self) -> u64 {
        lock(&self.recorded).written
    }

    /// Events that are not in the file: dropped by the log, or above ``limit``. 0 until it is closed.
    #[getter]
    fn lost(&self) -> u64 {
        lock(&self.recorded).lost
    }

    /// Writes the remaining events and closes the file; a second call does nothing. Raises OSError.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let Some(recorder) = lock(&self.recorder).take() else {
            return Ok(());
        };
        let recorded = py.detach(|| recorder.finish()).map_err(failed)?;
        *lock(&self.recorded) = recorded;
        Ok(())
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: &Bound<'_, PyAny>,
        exc: &Bound<'_, PyAny>,
        traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let _ = (exc_type, exc, traceback);
        self.close(py)
    }
}
