//! Reading, generating and writing traces.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pagegate_core::errno::ETIMEDOUT;
use pagegate_core::error::Error;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::trace::about::About;
use pagegate_core::trace::data::{Trace, TraceError};
use pagegate_core::trace::synthetic::synthetic;
use pyo3::exceptions::{PyMemoryError, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

use crate::events::arrow;
use crate::events::event::{self, PyEvent};
use crate::events::html;
use crate::interpreter::{arguments, attach, errors, sizes};

/// These take some 15 GB.
const MOST_SYNTHETIC: u64 = 100_000_000;

pub(crate) fn failed(py: Python<'_>, error: TraceError) -> PyErr {
    match error {
        TraceError::File { path, source } => match source.raw_os_error() {
            Some(errno) => PyOSError::new_err((errno, strerror(&source), path)),
            None => PyOSError::new_err(format!("{path}: {source}")),
        },
        error @ TraceError::Encoding { .. } => PyOSError::new_err(error.to_string()),
        error @ (TraceError::Format(_) | TraceError::Invalid(_)) => PyValueError::new_err(error.to_string()),
        TraceError::Stalled(path) => PyOSError::new_err((ETIMEDOUT, "nobody reads it", path)),
        TraceError::Interrupted(failure) => errors::raise(py, Error::Interrupted(failure)),
    }
}

/// The error's text without the number, which OSError adds itself.
fn strerror(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// What the caller says about the machine; it replaces what the trace says.
fn about(memory: Option<u64>, initial: Option<State>) -> PyResult<Option<About>> {
    match (memory, initial) {
        (None, None) => Ok(None),
        (Some(memory), initial) => About::new(memory, initial.unwrap_or(State::Shared))
            .map(Some)
            .ok_or_else(|| {
                PyValueError::new_err(format!(
                    "memory is {memory:#x}: it must be a positive multiple of {PAGE_SIZE}, at most 16 TiB"
                ))
            }),
        (None, Some(_)) => Err(PyValueError::new_err("initial goes with memory: pass both")),
    }
}

/// Requests that were recorded or generated, and facts about their machine: a sequence of events.
///
/// It is also an Arrow table, by ``__arrow_c_stream__``, as ``vm.events``.
#[pyclass(name = "Trace", module = "pagegate.trace", frozen)]
pub(crate) struct PyTrace(pub(super) Arc<Trace>);

#[pymethods]
impl PyTrace {
    /// Bytes of guest memory.
    #[getter]
    fn memory(&self) -> u64 {
        self.0.about.memory()
    }

    /// Bytes that were shared when the trace began.
    #[getter]
    fn shared_bytes(&self) -> u64 {
        self.0.about.shared_bytes()
    }

    /// Whether the host could read and write private pages, as ``Vm(debug_private=True)`` allows.
    #[getter]
    fn debug_private(&self) -> bool {
        self.0.about.debug_private()
    }

    /// Whether it was read from an IPC stream that ends in the middle, because its writer was killed.
    #[getter]
    fn truncated(&self) -> bool {
        self.0.truncated
    }

    /// Writes it to a file that ends in .parquet, .arrow (IPC file) or .arrows (IPC stream).
    ///
    /// Of a pipe the reader is waited for, until Ctrl-C. Raises OSError, and ValueError for another name.
    fn write(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        let write = || self.0.write(&path, &mut |_| attach::check_signals());
        py.detach(write).map_err(|error| failed(py, error))
    }

    fn __len__(&self) -> usize {
        self.0.events.len()
    }

    fn __getitem__<'py>(&self, py: Python<'py>, index: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let events = &self.0.events;
        event::item(py, index, events.len(), |at| events.get(at).copied().map(PyEvent::from))
    }

    fn _repr_html_(&self, py: Python<'_>) -> PyResult<String> {
        html::events(py, self.0.events.iter().copied().map(PyEvent::from))
    }

    fn __iter__(&self) -> PyTraceIterator {
        PyTraceIterator {
            trace: self.0.clone(),
            next: AtomicUsize::new(0),
        }
    }

    #[pyo3(signature = (requested_schema = None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyCapsule>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let trace = self.0.clone();
        let schema = trace.about.schema();
        let batches: Vec<_> = py.detach(|| trace.batches().collect());
        arrow::stream(py, &schema, batches.into_iter(), requested_schema)
    }

    fn __arrow_c_schema__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        arrow::schema(py, &self.0.about.schema())
    }

    fn __repr__(&self) -> String {
        let (events, memory) = (self.0.events.len(), self.0.about.memory());
        format!("<Trace of {events} requests in {memory:#x} bytes of memory>")
    }
}

/// Iterates over the events of a trace.
#[pyclass(name = "TraceIterator", module = "pagegate.trace", frozen)]
pub(crate) struct PyTraceIterator {
    trace: Arc<Trace>,
    next: AtomicUsize,
}

#[pymethods]
impl PyTraceIterator {
    fn __repr__(&self) -> String {
        let (next, events) = (self.next.load(Ordering::Relaxed), self.trace.events.len());
        format!("<pagegate.trace.TraceIterator at event {next} of {events}>")
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self) -> Option<PyEvent> {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        self.trace.events.get(at).map(|event| PyEvent::from(*event))
    }
}

/// Reads a trace from a file of any of the formats, ``vm.events``, or any Arrow table with their columns.
///
/// ``memory`` (bytes) and ``initial`` (the state of all pages at first) are for a table whose schema metadata, which
/// has both, was lost. An IPC stream that ends in the middle is read up to there, and ``truncated`` is set. A file may
/// be damaged, or made to do harm: whatever it says, reading it takes at most 512 times its size and 64 MiB of memory.
/// Raises OSError, TypeError for another ``source``, and ValueError for what is no trace.
#[pyfunction]
#[pyo3(signature = (source, *, memory = None, initial = None))]
pub(crate) fn read_trace(
    py: Python<'_>,
    source: &Bound<'_, PyAny>,
    #[pyo3(from_py_with = sizes::optional::<arguments::StatesOnly>)] memory: Option<u64>,
    #[pyo3(from_py_with = arguments::optional_state::<arguments::named::initial>)] initial: Option<State>,
) -> PyResult<PyTrace> {
    let about = about(memory, initial)?;
    if let Ok(trace) = source.cast::<PyTrace>() {
        let trace = trace.get().0.clone();
        return Ok(PyTrace(match about {
            Some(about) => Arc::new(Trace {
                about,
                events: trace.events.clone(),
                truncated: trace.truncated,
            }),
            None => trace,
        }));
    }
    let trace = if source.hasattr("__arrow_c_stream__")? || source.hasattr("__arrow_c_array__")? {
        arrow::trace(source, about)?
    } else {
        let path = arguments::path(source, "source must be a path, a Trace, vm.events, or an Arrow table")?;
        py.detach(|| Trace::read(&path, about, &mut attach::check_signals))
    };
    Ok(PyTrace(Arc::new(trace.map_err(|error| failed(py, error))?)))
}

/// Generates a trace of ``requests`` requests: a busy guest of 1 GiB that starts out private.
///
/// Each is converted as asked. The same arguments give the same trace. About 60 of 100 requests share bounce buffers of
/// 256 KiB or take them back (explicit), 25 touch pages of rings (implicit), 10 touch one of eight pages privately and
/// shared in turn (implicit), and 5 are for 2 MiB blocks (explicit). ``requests`` is at most 100 million and ``vcpus``
/// at least 1, else ValueError. MemoryError where there is no memory for it.
#[pyfunction]
#[pyo3(signature = (requests = 1_000_000, *, seed = 0, vcpus = 1))]
pub(crate) fn synthetic_trace(
    py: Python<'_>,
    #[pyo3(from_py_with = arguments::integer::<arguments::named::requests, _>)] requests: u64,
    #[pyo3(from_py_with = arguments::integer::<arguments::named::seed, _>)] seed: u64,
    #[pyo3(from_py_with = arguments::integer::<arguments::named::vcpus, _>)] vcpus: u32,
) -> PyResult<PyTrace> {
    if vcpus == 0 {
        return Err(PyValueError::new_err("vcpus is 0: it must be at least 1"));
    }
    if requests > MOST_SYNTHETIC {
        return Err(PyValueError::new_err(format!(
            "requests is {requests}: it must be at most {MOST_SYNTHETIC}, for they are made in memory"
        )));
    }
    let made = py.detach(|| synthetic(requests, seed, vcpus, &mut attach::check_signals));
    let made = made.map_err(|failure| errors::raise(py, Error::Interrupted(failure)))?;
    Ok(PyTrace(Arc::new(made.map_err(|_| PyMemoryError::new_err(()))?)))
}
