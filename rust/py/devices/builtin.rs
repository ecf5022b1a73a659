//! The built-in devices.

use std::fs::OpenOptions;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use pagegate_core::devices::console::Console;
use pagegate_core::devices::virtio::block::Block;
use pagegate_core::devices::virtio::console::VirtioConsole;
use pagegate_core::devices::virtio::device::Device;
use pagegate_core::devices::virtio::net::{self, Net};
use pagegate_core::devices::virtio::rng::Rng;
use pagegate_core::devices::virtio::vsock::{self, Vsock};
use pagegate_core::errno::{EADDRINUSE, EBUSY, ENODEV};
use pagegate_core::error::Error;
use pagegate_core::machine::assembly::Machine;
use parking_lot::Mutex;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

use super::console::PyConsolePort;
use super::python::PyDevice;
use crate::interpreter::{arguments, call, errors};

/// The base class of the built-in devices. Each belongs to one machine.
#[pyclass(name = "BuiltinDevice", module = "pagegate.devices", frozen, subclass)]
pub(crate) struct PyBuiltinDevice {
    /// Until it is given to a machine, which then closes what it has open.
    device: Mutex<Option<Arc<dyn Device>>>,
    /// What it is called where no name was given.
    name: &'static str,
    /// What tells it from others of its class.
    about: String,
}

impl PyBuiltinDevice {
    fn new(name: &'static str, about: String, device: impl Device + 'static) -> Self {
        Self {
            device: Mutex::new(Some(Arc::new(device))),
            name,
            about,
        }
    }

    /// Gives it to a machine.
    fn give(&self, py: Python<'_>, machine: &Machine, name: Option<&str>, logs_accesses: bool) -> PyResult<()> {
        let device = self.device.lock().take();
        let device = device
            .ok_or_else(|| PyValueError::new_err("this device belongs to a machine already: make one for each"))?;
        let (name, of_machine) = (name.unwrap_or(self.name), device.clone());
        let added = py.detach(|| machine.add_device(name, of_machine, logs_accesses));
        if added.is_err() {
            *self.device.lock() = Some(device);
        }
        added.map_err(|error| errors::raise(py, error))
    }
}

#[pymethods]
impl PyBuiltinDevice {
    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let class = slf.get_type().name()?;
        let about = &slf.get().about;
        let space = if about.is_empty() { "" } else { " " };
        Ok(format!("<pagegate.devices.{class}{space}{about}>"))
    }
}

/// Puts a device on a machine's PCI bus. Returns it if it is one in Python.
pub(crate) fn add(
    vm: &Bound<'_, PyAny>,
    machine: &Machine,
    device: &Bound<'_, PyAny>,
    name: Option<&str>,
    logs_accesses: bool,
) -> PyResult<Option<Arc<PyDevice>>> {
    let py = vm.py();
    let Ok(builtin) = device.cast::<PyBuiltinDevice>() else {
        let kind = device.get_type().name()?.to_string();
        let device = Arc::new(PyDevice::resolve(device)?);
        let (name, of_machine) = (name.unwrap_or(&kind), device.clone());
        // It may have to wait for a conversion, and its listeners.
        let added = py.detach(|| machine.add_device(name, of_machine, logs_accesses));
        added.map_err(|error| errors::raise(py, error))?;
        return Ok(Some(device));
    };
    builtin.get().give(py, machine, name, logs_accesses)?;
    if let Ok(console) = device.cast::<PyConsole>() {
        console.get().console.call_method1(py, "_attach", (vm,))?;
    }
    Ok(None)
}

type Made<T> = PyResult<PyClassInitializer<T>>;

/// A disk (virtio-blk): a raw file or a block device, in sectors of 512 bytes.
///
/// ``path``: the file, of which the bytes after the last whole sector are no part. ``read_only``: the guest cannot
/// write to it. A flush by the guest is an fdatasync(2). Raises OSError, with EBUSY if it is another disk as well
/// and not both are read-only, and ValueError for less than a sector.
#[pyclass(name = "Block", module = "pagegate.devices", frozen, extends = PyBuiltinDevice)]
pub(crate) struct PyBlock;

#[pymethods]
impl PyBlock {
    #[new]
    #[pyo3(signature = (path, read_only = false))]
    fn new(
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::path_named::<arguments::named::path>)] path: PathBuf,
        #[pyo3(from_py_with = arguments::flag::<arguments::named::read_only>)] read_only: bool,
    ) -> Made<Self> {
        let made = py.detach(|| {
            // Before it is opened: a pipe would keep this call until somebody writes to it.
            let kind = std::fs::metadata(&path)?.file_type();
            if !kind.is_file() && !kind.is_block_device() {
                return Ok(Err(Error::Invalid("a disk is a file or a block device".to_owned())));
            }
            let file = OpenOptions::new().read(true).write(!read_only).open(&path);
            file.map(|file| Block::new(file, read_only))
        });
        let block = made.map_err(|error| errors::of_file(&error, &path))?;
        let about = format!("{}{}", path.display(), if read_only { ", read only" } else { "" });
        let block = block.map_err(|error| match error {
            Error::Host { errno, .. } if errno.0 == EBUSY => {
                PyOSError::new_err((errno.0, "it is in use as a disk elsewhere", path))
            }
            error => errors::raise(py, error),
        })?;
        Ok((Self, PyBuiltinDevice::new("disk", about, block)).into())
    }
}

/// A source of entropy (virtio-rng): the host's getrandom(2).
#[pyclass(name = "Rng", module = "pagegate.devices", frozen, extends = PyBuiltinDevice)]
pub(crate) struct PyRng;

#[pymethods]
impl PyRng {
    #[new]
    fn new() -> Made<Self> {
        Ok((Self, PyBuiltinDevice::new("rng", String::new(), Rng)).into())
    }
}

/// A console (virtio-console): hvc0 in Linux, which uses it as its console with console=hvc0 on its command line.
#[pyclass(name = "Console", module = "pagegate.devices", frozen, extends = PyBuiltinDevice)]
pub(crate) struct PyConsole {
    console: Py<PyAny>,
}

#[pymethods]
impl PyConsole {
    #[new]
    fn new(py: Python<'_>) -> Made<Self> {
        let console = Arc::new(Console::default());
        let class = py.import("pagegate.console")?.getattr("Console")?;
        let file = class.call1((PyConsolePort::new(&console),))?.unbind();
        let device = VirtioConsole::new(console).map_err(|error| errors::raise(py, error))?;
        Ok((
            Self { console: file },
            PyBuiltinDevice::new("console", String::new(), device),
        )
            .into())
    }

    /// Its other end, as ``Vm.console`` is that of the serial port.
    #[getter]
    fn console(&self, py: Python<'_>) -> Py<PyAny> {
        self.console.clone_ref(py)
    }
}

/// Streams between programs of the guest and of the host (virtio-vsock), as Firecracker has them.
///
/// ``cid``: the guest's context ID, 3 or more. A program of the host connects to the Unix socket ``path``, writes
/// ``CONNECT <port>`` and a newline, and reads ``OK <its own port>`` and a newline once a program of the guest has
/// taken it. A program of the guest that connects to port P of context ID 2 is connected to the Unix socket
/// ``<path>_P``. There are 256 streams at most.
///
/// ``path`` is made, and removed with the machine. Raises OSError if it exists, which says so if it is a socket that
/// nobody listens at any more, and ValueError for another ``cid``.
#[pyclass(name = "Vsock", module = "pagegate.devices", frozen, extends = PyBuiltinDevice)]
pub(crate) struct PyVsock;

#[pymethods]
impl PyVsock {
    #[new]
    fn new(
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::cid, _>)] cid: u32,
        #[pyo3(from_py_with = arguments::path_named::<arguments::named::path>)] path: PathBuf,
    ) -> Made<Self> {
        let listener = UnixListener::bind(&path).map_err(|error| match error.raw_os_error() {
            Some(errno @ EADDRINUSE) if vsock::is_left_over(&path) => {
                let why = "nobody listens at it: whoever made it has ended, so remove it and try again";
                PyOSError::new_err((errno, why, path.as_os_str().to_owned()))
            }
            _ => errors::of_file(&error, &path),
        })?;
        let about = format!("CID {cid} at {}", path.display());
        let made = Vsock::new(cid, listener, path.clone());
        let vsock = made.map_err(|error| {
            let _ = std::fs::remove_file(&path);
            errors::raise(py, error)
        })?;
        Ok((Self, PyBuiltinDevice::new("vsock", about, vsock)).into())
    }
}

/// A network card (virtio-net) at a tap of the host, or at a program that has the other end of a socket.
///
/// ``tap``: the tap's name. Or a descriptor, as a number or an object with ``fileno()``: of a tap without a header
/// (IFF_NO_PI, not IFF_VNET_HDR), or of a Unix datagram socket, each datagram of which is a frame. The card has a
/// descriptor of its own, with O_NONBLOCK set for both. ``mac``: its address, as "52:54:00:12:34:56"; by default a
/// random one. ``create``: a tap of that name is made if there is none, and goes with the machine; it is down and has
/// no address.
///
/// Frames of 64 KiB and more are lost, as are those that the other side does not take. Raises OSError where the tap
/// cannot be had (ENODEV: there is none; EPERM: it needs CAP_NET_ADMIN), and ValueError for a descriptor of something
/// else and for an address that is not one card's.
#[pyclass(name = "Net", module = "pagegate.devices", frozen, extends = PyBuiltinDevice)]
pub(crate) struct PyNet {
    mac: [u8; 6],
}

#[pymethods]
impl PyNet {
    #[new]
    #[pyo3(signature = (tap, mac = None, *, create = false))]
    fn new(
        py: Python<'_>,
        tap: &Bound<'_, PyAny>,
        #[pyo3(from_py_with = arguments::optional_text::<arguments::named::mac>)] mac: Option<String>,
        #[pyo3(from_py_with = arguments::flag::<arguments::named::create>)] create: bool,
    ) -> Made<Self> {
        let parsed = mac.map(|text| net::parse_address(&text).ok_or(text)).transpose();
        let mac =
            parsed.map_err(|text| PyValueError::new_err(format!("mac is {text:?}: write it as 52:54:00:12:34:56")))?;
        let (link, name) = match tap.extract::<String>() {
            Ok(name) => (net::open_tap(&name, create), name),
            Err(_) => {
                let number = match tap.hasattr("fileno")? {
                    true => (*call::call_alone(&tap.getattr("fileno")?)?).clone(),
                    false => tap.clone(),
                };
                let number: i32 = arguments::integer_named(&number, "tap", "a tap's name, or a descriptor", "")?;
                (net::duplicate(number), format!("descriptor {number}"))
            }
        };
        let link = link.map_err(|errno| match errno.0 {
            ENODEV => PyOSError::new_err((
                ENODEV,
                format!("there is no such tap: make it by ip tuntap add {name} mode tap"),
                name.clone(),
            )),
            _ => errors::of_file(&errno.into(), name.as_ref()),
        })?;
        let net = Net::new(link, mac).map_err(|error| errors::raise(py, error))?;
        let mac = net.mac();
        Ok((Self { mac }, PyBuiltinDevice::new("net", name, net)).into())
    }

    /// Its address.
    #[getter]
    fn mac(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }
}
