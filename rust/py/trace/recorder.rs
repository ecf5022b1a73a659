//! Writing a machine's events to a file while it runs.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pagegate_core::trace::about::About;
use pagegate_core::trace::recorder::{Recorded, Recorder};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::recorded::failed;
use crate::interpreter::{arguments, attach, call};
use crate::machine::vm::PyVm;

/// Writes a machine's events to a file while it runs, from now on, in a thread of its own.
///
/// ``path`` ends in .parquet, .arrow (IPC file) or .arrows (IPC stream); the file is created, or overwritten. The
/// first two can be read once the recorder is closed, the last at any time. No vCPU waits for it: events that the log
/// dropped before they were written are counted as lost, and so are those above ``limit``, which bounds the file,
/// with 65536 malformed requests beside the others. If the file cannot be written, the run in progress ends as
/// "stopped" and ``close`` raises the error. It may be a pipe: its reader is waited for here and in ``close``, until
/// Ctrl-C. At the end of a ``with`` by an exception a reader that has stalled is not waited for.
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

impl Drop for PyRecorder {
    fn drop(&mut self) {
        let mut recorder = lock(&self.recorder).take();
        if recorder.is_some() {
            // Its thread writes what is left, which takes as long as the file takes.
            Python::try_attach(|py| py.detach(|| drop(recorder.take())));
        }
    }
}

#[pymethods]
impl PyRecorder {
    #[new]
    #[pyo3(signature = (vm, path, *, limit = None))]
    fn new(
        py: Python<'_>,
        vm: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = arguments::path_named::<arguments::named::path>)] path: PathBuf,
        #[pyo3(from_py_with = arguments::optional::<arguments::named::limit, _>)] limit: Option<u64>,
    ) -> PyResult<Self> {
        let Ok(recorded) = vm.cast::<PyVm>() else {
            let message = format!("vm is {}: it must be a Vm", call::repr(vm)?);
            return Err(PyTypeError::new_err(message));
        };
        let machine = recorded.get().0.machine(py)?;
        let start = || {
            let about = About::now(machine.events(), machine.memory(), machine.debug_private());
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
                &mut attach::check_signals,
            )
        };
        let recorder = py.detach(start).map_err(|error| failed(py, error))?;
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

    /// Malformed requests among those that are lost. 0 until it is closed.
    #[getter]
    fn lost_malformed(&self) -> u64 {
        lock(&self.recorded).lost_malformed
    }

    /// Writes the remaining events and closes the file; a second call does nothing. Raises OSError.
    ///
    /// ``timeout``: after so many seconds a pipe's reader that has read nothing for half a second is given up, with
    /// TimeoutError. ``None``: never.
    #[pyo3(signature = (*, timeout = None))]
    fn close(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::timeout)] timeout: Option<Duration>,
    ) -> PyResult<()> {
        let Some(recorder) = lock(&self.recorder).take() else {
            return Ok(());
        };
        let finish = || recorder.finish(timeout, &mut attach::check_signals);
        let recorded = py.detach(finish).map_err(|error| failed(py, error))?;
        *lock(&self.recorded) = recorded;
        Ok(())
    }

    fn __repr__(&self) -> String {
        match lock(&self.recorder).is_some() {
            true => "<pagegate.trace.Recorder: open>".to_owned(),
            false => {
                let recorded = lock(&self.recorded);
                format!(
                    "<pagegate.trace.Recorder: {} written, {} lost>",
                    recorded.written, recorded.lost
                )
            }
        }
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
        let _ = (exc, traceback);
        self.close(py, (!exc_type.is_none()).then_some(Duration::ZERO))
    }
}
