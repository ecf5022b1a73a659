//! A device's queue and the requests in it, as a device in Python has them while its ``process`` is called.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use pagegate_core::devices::virtio::queue::{Buffer, NoAccess, Queue, Request, total};
use pyo3::exceptions::{PyMemoryError, PyRuntimeError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::interpreter::{arguments, errors, sizes};

/// The most bytes that one read copies.
const MOST: u64 = 64 << 20;

/// One call of a device's ``process``. Afterwards its objects are of no use.
pub(super) struct Turn {
    thread: ThreadId,
    index: usize,
    state: Mutex<Option<State>>,
}

struct State {
    queues: Vec<Queue>,
    /// Those that were taken, by number; `None` once completed.
    requests: Vec<Option<Request>>,
}

impl Turn {
    pub(super) fn new(queues: Vec<Queue>, index: usize) -> Self {
        let requests = Vec::new();
        Self {
            thread: thread::current().id(),
            index,
            state: Mutex::new(Some(State { queues, requests })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes what was not, with nothing written, and gives the queues back.
    pub(super) fn end(&self) -> Vec<Queue> {
        let Some(mut state) = self.lock().take() else {
            return Vec::new();
        };
        for request in state.requests.into_iter().flatten() {
            state.queues[self.index].complete(request, 0);
        }
        state.queues
    }

    /// Does something with the queues, without the interpreter: guest memory's pages may be held by somebody who waits for
    /// it. No other thread uses them, so nobody waits for this lock.
    fn with<T: Send>(&self, py: Python<'_>, body: impl FnOnce(&mut State) -> T + Send) -> PyResult<T> {
        let over =
            || PyRuntimeError::new_err("a device's queue and requests are of use in process() and its thread only");
        if self.thread != thread::current().id() {
            return Err(over());
        }
        py.detach(|| self.lock().as_mut().map(body)).ok_or_else(over)
    }

    fn with_request<T: Send>(&self, py: Python<'_>, at: usize, body: impl FnOnce(&Request) -> T + Send) -> PyResult<T> {
        let done = self.with(py, |state| state.requests[at].as_ref().map(body))?;
        done.ok_or_else(|| PyRuntimeError::new_err("this request is completed already"))
    }
}

/// A queue in which there may be requests. Iterate over it to take them.
///
/// One iteration takes at most as many as the queue has entries; the rest come with the next call of ``process``.
#[pyclass(name = "DeviceQueue", module = "pagegate.devices", frozen)]
pub(crate) struct PyDeviceQueue(Arc<Turn>);

impl PyDeviceQueue {
    pub(super) fn of(turn: &Arc<Turn>) -> Self {
        Self(turn.clone())
    }
}

#[pymethods]
impl PyDeviceQueue {
    fn __repr__(&self) -> String {
        format!("<pagegate.devices.DeviceQueue {}>", self.0.index)
    }

    /// Its index.
    #[getter]
    fn index(&self) -> usize {
        self.0.index
    }

    /// How many entries it has.
    #[getter]
    fn size(&self, py: Python<'_>) -> PyResult<u16> {
        let index = self.0.index;
        self.0.with(py, |state| state.queues[index].size())
    }

    fn __iter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __next__(&self, py: Python<'_>) -> PyResult<Option<PyDeviceRequest>> {
        let index = self.0.index;
        let taken = self.0.with(py, |state| {
            let request = state.queues[index].take()?;
            let head = request.head();
            let parts = copied(request.readable()).and_then(|readable| Ok((readable, copied(request.writable())?)));
            state.requests.push(Some(request));
            Some((state.requests.len() - 1, head, parts))
        })?;
        let Some((at, head, parts)) = taken else {
            return Ok(None);
        };
        let (readable, writable) = parts?;
        Ok(Some(PyDeviceRequest {
            turn: self.0.clone(),
            at,
            head,
            readable,
            writable,
        }))
    }

    /// Tells the driver that a request is completed which need not be one, with any length, as a lying device does.
    ///
    /// ``head``: its id, 0 to 2**32-1. ``written``: 0 to 2**32-1. The request itself, if there is one, stays as it is.
    fn complete(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::head, _>)] head: u32,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::written, _>)] written: u32,
    ) -> PyResult<()> {
        let index = self.0.index;
        self.0.with(py, |state| state.queues[index].complete_as(head, written))
    }
}

/// A request: parts of guest memory to read, and parts to write.
#[pyclass(name = "DeviceRequest", module = "pagegate.devices", frozen)]
pub(crate) struct PyDeviceRequest {
    turn: Arc<Turn>,
    at: usize,
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

/// A copy of what may be as many buffers as a queue has entries.
fn copied(buffers: &[Buffer]) -> PyResult<Vec<Buffer>> {
    let mut copy = Vec::new();
    let room = copy.try_reserve_exact(buffers.len());
    room.map_err(|_| PyMemoryError::new_err(()))?;
    copy.extend_from_slice(buffers);
    Ok(copy)
}

fn parts(buffers: &[Buffer]) -> Vec<(u64, u32)> {
    buffers.iter().map(|buffer| (buffer.gpa, buffer.len)).collect()
}

fn no_access(py: Python<'_>, what: &str, offset: u64, size: usize) -> PyErr {
    let message = format!(
        "the {size} bytes to {what} from offset {offset} on are not all shared memory, or the request has fewer"
    );
    errors::device_access(py, message)
}

#[pymethods]
impl PyDeviceRequest {
    /// Index of its first descriptor.
    #[getter]
    fn head(&self) -> u16 {
        self.head
    }

    /// What the device reads: ``(gpa, size)`` in bytes for each part, as the driver gave them.
    #[getter]
    fn readable(&self) -> Vec<(u64, u32)> {
        parts(&self.readable)
    }

    /// What the device writes: ``(gpa, size)`` in bytes for each part, as the driver gave them.
    #[getter]
    fn writable(&self) -> Vec<(u64, u32)> {
        parts(&self.writable)
    }

    /// Bytes of all readable parts.
    #[getter]
    fn readable_size(&self) -> u64 {
        total(&self.readable)
    }

    /// Bytes of all writable parts.
    #[getter]
    fn writable_size(&self) -> u64 {
        total(&self.writable)
    }

    /// Reads from the readable parts as if they were one, from ``offset`` on; ``size=None``: all that follows.
    ///
    /// DeviceAccessError if not all of it is shared memory, there is not as much, or it is more than 64 MiB.
    #[pyo3(signature = (offset = 0, size = None))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::offset, _>)] offset: u64,
        #[pyo3(from_py_with = sizes::optional::<arguments::named::size>)] size: Option<u64>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let size = size.unwrap_or_else(|| total(&self.readable).saturating_sub(offset));
        if size > MOST {
            let message = format!("{size} bytes are more than the 64 MiB of one read");
            return Err(errors::device_access(py, message));
        }
        let size = size as usize;
        PyBytes::new_with(py, size, |into| {
            let read = self
                .turn
                .with_request(py, self.at, |request| request.read(offset, into))?;
            read.map_err(|NoAccess| no_access(py, "read", offset, size))
        })
    }

    /// Writes to the writable parts as if they were one, from ``offset`` on.
    ///
    /// DeviceAccessError if not all of it is shared memory, or there is not as much.
    #[pyo3(signature = (data, offset = 0))]
    fn write(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::bytes_named::<arguments::named::data>)] data: Vec<u8>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::offset, _>)] offset: u64,
    ) -> PyResult<()> {
        let from = &data;
        let written = self
            .turn
            .with_request(py, self.at, |request| request.write(offset, from))?;
        written.map_err(|NoAccess| no_access(py, "write", offset, data.len()))
    }

    /// Gives the request back to the driver. ``written``: how many bytes were written, 0 to 2**32-1.
    ///
    /// A request that is not completed when ``process`` returns is completed with 0.
    #[pyo3(signature = (written = 0))]
    fn complete(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::written, _>)] written: u32,
    ) -> PyResult<()> {
        let (at, index) = (self.at, self.turn.index);
        let done = self.turn.with(py, |state| {
            let request = state.requests[at].take()?;
            state.queues[index].complete(request, written);
            Some(())
        })?;
        done.ok_or_else(|| PyRuntimeError::new_err("this request is completed already"))
    }

    fn __repr__(&self) -> String {
        let (head, read, write) = (self.head, self.readable_size(), self.writable_size());
        format!("<pagegate.devices.DeviceRequest {head}: {read} bytes to read, {write} to write>")
    }
}
