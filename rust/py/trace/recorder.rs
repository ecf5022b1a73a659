//! A machine's events, written to a file while it runs.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pagegate_core::trace::about::About;
use pagegate_core::trace::recorder::{Recorded, Recorder};
use pyo3::prelude::*;

use super::recorded::failed;
use crate::interpreter::arguments;
use crate::machine::vm::PyVm;

/// Writes a machine's events to a file while it runs, in a thread of its own, from the moment it is made.
///
/// ``path`` ends in .parquet, .arrow (IPC file) or .arrows (IPC stream); it is made, or emptied. The first two can be
/// read once this is closed, the last at any time. No vCPU waits for it: what the log drops before it is written is
/// counted, and so is what comes after ``limit`` events, for a guest asks as often as it likes. What cannot be written
/// ends the run in progress as "stopped", and ``close`` says why. Raises OSError, and ValueError for another name.
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
            // What happens from now on would be off the record.
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

    /// Events that are in the file, once it is closed.
    #[getter]
    fn written(&self) -> u64 {
        lock(&self.recorded).written
    }

    /// Events that are not in the file: dropped by the log before, or above the limit. Once it is closed.
    #[getter]
    fn lost(&self) -> u64 {
        lock(&self.recorded).lost
    }

    /// Writes what there is and closes the file. Raises OSError if anything could not be written. Once is enough.
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
