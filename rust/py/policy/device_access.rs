//! A device's access to a page that is not shared.

use pagegate_core::policy::device_access::DeviceAccess;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::interpreter::arguments;
use crate::interpreter::record::{self, Fields};

/// Of a [`PyDeviceAccess`].
const FIELDS: [&str; 8] = [
    "device",
    "number",
    "queue",
    "descriptor",
    "gpa",
    "size",
    "write",
    "state",
];

/// A device was told to access a page that is not shared. Nothing was read or written.
///
/// One can be made from all of its fields, as ``asdict`` gives them; TypeError if they are not these.
#[pyclass(name = "DeviceAccess", module = "pagegate", frozen, get_all)]
pub(crate) struct PyDeviceAccess {
    /// The device's name.
    device: String,
    /// Its number on the PCI bus, from 1.
    number: u32,
    /// Index of its queue.
    queue: u16,
    /// Index of the first descriptor of the request that names the page; ``None`` for the queue's rings.
    descriptor: Option<u16>,
    /// The first byte that is not shared, without the view bit.
    gpa: u64,
    /// Bytes from there to the end of the access.
    size: u64,
    /// Whether the device was to write.
    write: bool,
    /// The state of the page. "shared" if it was private for a moment since the driver made the request.
    state: &'static str,
}

impl From<&DeviceAccess> for PyDeviceAccess {
    fn from(access: &DeviceAccess) -> Self {
        Self {
            device: access.device.to_string(),
            number: access.number,
            queue: access.queue,
            descriptor: access.descriptor,
            gpa: access.gpa,
            size: access.size,
            write: access.write,
            state: access.state.as_str(),
        }
    }
}

#[pymethods]
impl PyDeviceAccess {
    #[new]
    #[pyo3(signature = (**fields))]
    fn new(py: Python<'_>, fields: Option<Bound<'_, PyDict>>) -> PyResult<Self> {
        let fields = Fields::of(py, fields, &FIELDS)?;
        let state: String = fields.get("state")?;
        Ok(Self {
            device: fields.get("device")?,
            number: fields.get("number")?,
            queue: fields.get("queue")?,
            descriptor: fields.get("descriptor")?,
            gpa: fields.get("gpa")?,
            size: fields.get("size")?,
            write: fields.get("write")?,
            state: arguments::state(&state, "state")?.as_str(),
        })
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &FIELDS)
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &FIELDS)
    }

    fn __repr__(&self) -> String {
        let Self {
            device,
            queue,
            gpa,
            size,
            state,
            ..
        } = self;
        let verb = if self.write { "write" } else { "read" };
        format!("<pagegate.DeviceAccess {device}, queue {queue}: {verb} {size:#x} at {gpa:#x}, {state}>")
    }
}
