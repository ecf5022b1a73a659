//! Recorded requests.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pagegate_core::attributes::{PAGE_SIZE, State};
use pagegate_core::error::Error;
use pagegate_core::policy::Policy;
use pagegate_core::trace::{self, About, Judged, Recorded, Recorder, ReplayError, Trace, TraceError};
use pyo3::exceptions::{PyIndexError, PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyTuple};

use crate::events::PyEvent;
use crate::machine::PyVm;
use crate::policy::{Judge, forget_requests};
use crate::{arrow, decision, errors, names};

/// Some 15 GB of them.
const MOST_SYNTHETIC: u64 = 100_000_000;

pub(crate) fn failed(error: TraceError) -> PyErr {
    match error {
        TraceError::File { path, source } => match source.raw_os_error() {
            Some(errno) => PyOSError::new_err((errno, strerror(&source), path)),
            None => PyOSError::new_err(format!("{path}: {source}")),
        },
        error @ TraceError::Encoding { .. } => PyOSError::new_err(error.to_string()),
        error @ (TraceError::Format(_) | TraceError::Invalid(_)) => PyValueError::new_err(error.to_string()),
    }
}

/// Without the number, which an OSError shows by itself.
fn strerror(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

/// What the caller says of the machine, in place of the trace.
fn about(memory: Option<u64>, initial: Option<&str>) -> PyResult<Option<About>> {
    let initial = initial.map(|state| names::state(state, "initial")).transpose()?;
    match (memory, initial) {
        (None, None) => Ok(None),
        (Some(memory), initial) => About::new(memory, initial.unwrap_or(State::Shared))
            .map(Some)
            .ok_or_else(|| {
                PyValueError::new_err(format!(
                    "memory is {memory:#x}: it must be a positive multiple of {PAGE_SIZE}, at most 4 PiB"
                ))
            }),
        (None, Some(_)) => Err(PyValueError::new_err("initial goes with memory: pass both")),
    }
}

/// Requests that were recorded, or made up, and the machine they were made in: a sequence, and an Arrow table.
///
/// A table by ``__arrow_c_stream__``, as ``vm.events``.
#[pyclass(name = "Trace", module = "pagegate.trace", frozen)]
pub(crate) struct PyTrace(Arc<Trace>);

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
        self.0.about.model().shared_bytes()
    }

    /// It was read from an IPC stream that ends in the middle: whoever wrote it was killed.
    #[getter]
    fn truncated(&self) -> bool {
        self.0.truncated
    }

    /// Writes it to a file: .parquet, .arrow (IPC file) or .arrows (IPC stream).
    ///
    /// Raises OSError, and ValueError for another name.
    fn write(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        py.detach(|| self.0.write(&path)).map_err(failed)
    }

    fn __len__(&self) -> usize {
        self.0.events.len()
    }

    fn __getitem__(&self, index: isize) -> PyResult<PyEvent> {
        let events = &self.0.events;
        let at = if index < 0 {
            index + events.len() as isize
        } else {
            index
        };
        let event = usize::try_from(at).ok().and_then(|at| events.get(at));
        event
            .map(|event| PyEvent::from(*event))
            .ok_or_else(|| PyIndexError::new_err("there is no such event"))
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

/// One event after the other.
#[pyclass(name = "TraceIterator", module = "pagegate.trace", frozen)]
pub(crate) struct PyTraceIterator {
    trace: Arc<Trace>,
    next: AtomicUsize,
}

#[pymethods]
impl PyTraceIterator {
    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self) -> Option<PyEvent> {
        let at = self.next.fetch_add(1, Ordering::Relaxed);
        self.trace.events.get(at).map(|event| PyEvent::from(*event))
    }
}

/// Reads a trace: a file of any of the formats, ``vm.events``, or any table that has their columns.
///
/// ``memory`` (bytes) and ``initial`` (the state of all pages at first) are for a table that lost its schema's
/// metadata, which tell both. Of an IPC stream that ends in the middle what is there is read, and ``truncated`` says
/// so. Raises OSError, and ValueError for what is no trace.
#[pyfunction]
#[pyo3(signature = (source, *, memory = None, initial = None))]
pub(crate) fn read_trace(
    py: Python<'_>,
    source: &Bound<'_, PyAny>,
    #[pyo3(from_py_with = names::optional_u64)] memory: Option<u64>,
    initial: Option<&str>,
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
        let path: PathBuf = source
            .extract()
            .map_err(|_| PyTypeError::new_err("source must be a path, a Trace, vm.events, or an Arrow table"))?;
        py.detach(|| Trace::read(&path, about))
    };
    Ok(PyTrace(Arc::new(trace.map_err(failed)?)))
}

/// A trace of ``requests`` requests that no guest made: a busy guest of 1 GiB that starts out private.
///
/// Each is converted as asked. The same arguments give the same trace. Of a hundred requests about 60 share bounce
/// buffers of 256 KiB or take them back (explicit), 25 touch pages of rings (implicit), 10 touch one of eight pages
/// privately and shared in turn (implicit), and 5 are for 2 MiB blocks (explicit).
#[pyfunction]
#[pyo3(signature = (requests = 1_000_000, *, seed = 0, vcpus = 1))]
pub(crate) fn synthetic_trace(
    py: Python<'_>,
    #[pyo3(from_py_with = names::u64)] requests: u64,
    #[pyo3(from_py_with = names::u64)] seed: u64,
    #[pyo3(from_py_with = names::u32)] vcpus: u32,
) -> PyResult<PyTrace> {
    if vcpus == 0 {
        return Err(PyValueError::new_err("vcpus is 0: it must be at least 1"));
    }
    if requests > MOST_SYNTHETIC {
        return Err(PyValueError::new_err(format!(
            "requests is {requests}: it must be at most {MOST_SYNTHETIC}, for they are made in memory"
        )));
    }
    Ok(PyTrace(Arc::new(py.detach(|| trace::synthetic(requests, seed, vcpus)))))
}

/// What a policy made of all requests of a trace.
#[pyclass(name = "Judged", module = "pagegate.trace", frozen, get_all, eq)]
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PyJudged {
    /// Decisions to convert.
    converted: u64,
    /// Decisions to refuse.
    denied: u64,
    /// Decisions to let the guest try again.
    retried: u64,
    /// Decisions to end the run.
    stopped: u64,
    /// Decisions to free a poisoned page.
    discarded: u64,
    /// Bytes that became private.
    bytes_to_private: u64,
    /// Bytes that became shared.
    bytes_to_shared: u64,
    /// The most bytes that were shared at any time.
    peak_shared: u64,
    /// Conversions that turned pages back: of which some had been converted before.
    ping_pongs: u64,
    /// The sequence number of the first request at which the run would have ended; ``None`` if at none.
    ends: Option<u64>,
    /// Decisions that are not the recorded ones.
    differences: u64,
}

impl From<Judged> for PyJudged {
    fn from(judged: Judged) -> Self {
        Self {
            converted: judged.converted,
            denied: judged.denied,
            retried: judged.retried,
            stopped: judged.stopped,
            discarded: judged.discarded,
            bytes_to_private: judged.bytes_to_private,
            bytes_to_shared: judged.bytes_to_shared,
            peak_shared: judged.peak_shared,
            ping_pongs: judged.ping_pongs,
            ends: judged.ends,
            differences: judged.differences,
        }
    }
}

#[pymethods]
impl PyJudged {
    fn __repr__(&self) -> String {
        let Self {
            converted,
            denied,
            retried,
            stopped,
            peak_shared,
            ping_pongs,
            differences,
            ..
        } = self;
        format!(
            "Judged(converted={converted}, denied={denied}, retried={retried}, stopped={stopped}, \
             peak_shared={peak_shared:#x}, ping_pongs={ping_pongs}, differences={differences})"
        )
    }
}

/// A request on which the policies and the record do not agree.
#[pyclass(name = "Difference", module = "pagegate.trace", frozen, get_all)]
pub(crate) struct PyDifference {
    /// The request, with what was decided when it was recorded.
    event: Py<PyEvent>,
    /// What each policy decided, in their order.
    decisions: Py<PyTuple>,
}

#[pymethods]
impl PyDifference {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (event, decisions) = (self.event.bind(py).repr()?, self.decisions.bind(py).repr()?);
        Ok(format!("Difference({event}, {decisions})"))
    }
}

/// What a replay found.
#[pyclass(name = "Replay", module = "pagegate.trace", frozen, get_all)]
pub(crate) struct PyReplay {
    /// Requests that were put to each policy.
    requests: u64,
    /// Requests that the trace lacks, by the sequence numbers of the others.
    missing: u64,
    /// What was decided and done when the trace was recorded.
    recorded: Py<PyJudged>,
    /// What each policy would have decided and done, in their order.
    policies: Py<PyTuple>,
    /// Requests on which the policies and the record disagree: the first ones.
    differences: Py<PyTuple>,
    /// How many there are in all.
    different: u64,
}

#[pymethods]
impl PyReplay {
    fn __repr__(&self) -> String {
        let Self {
            requests, different, ..
        } = self;
        format!("Replay(requests={requests}, different={different})")
    }
}

/// Puts the requests of a trace to each of these policies, in the order in which the recorded one was asked.
///
/// No KVM is needed, and a chain of built-in policies never enters Python. ``trace`` is a Trace, or what ``read``
/// takes. ``policies`` are as for ``Vm``; each keeps states of its own, and ``remember=`` is remembered. ``keep``: how
/// many of the differences are kept. The requests stay as they were, whatever a policy decides: of a guest that is
/// refused something, nobody knows what it would have asked next.
///
/// Raises what a hook raises, with notes; PolicyError; ValueError for what is no trace.
#[pyfunction]
#[pyo3(signature = (trace, *policies, keep = 1000))]
pub(crate) fn replay(
    py: Python<'_>,
    trace: &Bound<'_, PyAny>,
    policies: &Bound<'_, PyTuple>,
    #[pyo3(from_py_with = names::usize)] keep: usize,
) -> PyResult<PyReplay> {
    let trace = read_trace(py, trace, None, None)?.0;
    let judges = policies
        .iter()
        .map(|policy| Judge::of(Some(&policy)))
        .collect::<PyResult<Vec<_>>>()?;
    let judging: Vec<Arc<dyn Policy>> = judges.iter().map(|judge| judge.policy.clone()).collect();
    let mut watch = || Python::attach(|py| py.check_signals()).map_err(errors::failure);
    let found = py.detach(|| trace::replay(&trace, &judging, keep, &mut watch));
    forget_requests(py);
    let found = found.map_err(|error| match error {
        ReplayError::Trace(error) => failed(error),
        ReplayError::Interrupted(failure) => errors::raise(py, Error::Interrupted(failure)),
        ReplayError::Policy {
            policy,
            sequence,
            site,
            failure,
        } => {
            let error = errors::raise(py, Error::Hook { site, failure });
            let which = match judging.len() {
                1 => String::new(),
                n => format!(", policy {} of {n}", policy + 1),
            };
            let _ = error
                .value(py)
                .call_method1("add_note", (format!("event {sequence} of the trace{which}"),));
            error
        }
    })?;
    let judged = |judged: Judged| Py::new(py, PyJudged::from(judged));
    let differences = found.differences.into_iter().map(|difference| {
        let decisions = difference.decisions.into_iter().map(|each| decision::write(py, each));
        let decisions = PyTuple::new(py, decisions.collect::<PyResult<Vec<_>>>()?)?;
        Py::new(
            py,
            PyDifference {
                event: Py::new(py, PyEvent::from(difference.event))?,
                decisions: decisions.unbind(),
            },
        )
    });
    let differences = differences.collect::<PyResult<Vec<_>>>()?;
    let policies = found.policies.into_iter().map(judged).collect::<PyResult<Vec<_>>>()?;
    Ok(PyReplay {
        requests: found.requests,
        missing: found.missing,
        recorded: judged(found.recorded)?,
        policies: PyTuple::new(py, policies)?.unbind(),
        differences: PyTuple::new(py, differences)?.unbind(),
        different: found.different,
    })
}

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
        #[pyo3(from_py_with = names::optional_u64)] limit: Option<u64>,
    ) -> PyResult<Self> {
        let machine = vm.get().machine(py)?;
        let start = || {
            let about = About::now(&machine);
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
