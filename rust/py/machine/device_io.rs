//! Python handlers for port IO and MMIO.

use std::cell::Cell;
use std::sync::Arc;
use std::thread::LocalKey;

use pagegate_core::devices::bus::{IoHandler, MmioHandler};
use pagegate_core::error::Failure;
use pagegate_core::hypervisor::exit::{Io, Mmio};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes};

use crate::interpreter::attach::attached;
use crate::interpreter::fields::Field;
use crate::interpreter::reuse::{self, HookArgument, Spare};
use crate::interpreter::{call, errors};

/// The bytes that an access writes, in one word: for all but string IO. Empty for a read.
struct Data {
    word: Field<u64>,
    len: Field<u32>,
}

/// The most bytes that a [`Data`] holds.
const WORD: usize = 8;

impl Data {
    fn of(data: &[u8]) -> (u64, u32) {
        let mut word = [0; WORD];
        let len = data.len().min(WORD);
        word[..len].copy_from_slice(&data[..len]);
        (u64::from_le_bytes(word), len as u32)
    }

    fn new((word, len): (u64, u32)) -> Self {
        let (word, len) = (word.into(), len.into());
        Self { word, len }
    }

    fn set(&self, (word, len): (u64, u32)) {
        self.word.set(word);
        self.len.set(len);
    }

    fn bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let word = self.word.get().to_le_bytes();
        PyBytes::new(py, &word[..word.len().min(self.len.get() as usize)])
    }
}

/// One port IO exit. For string IO it stands for ``count`` accesses of ``size`` bytes.
#[pyclass(name = "Io", module = "pagegate", frozen)]
pub(crate) struct PyIo {
    /// Index of the vCPU.
    #[pyo3(get)]
    vcpu: Field<u32>,
    /// The port.
    #[pyo3(get)]
    port: Field<u16>,
    /// Whether it is OUT, not IN.
    #[pyo3(get)]
    write: Field<bool>,
    /// Bytes of one access: 1, 2 or 4.
    #[pyo3(get)]
    size: Field<u8>,
    /// Number of accesses.
    #[pyo3(get)]
    count: Field<u32>,
    data: Data,
    /// What was written, if it is more than a [`Data`] holds (string IO).
    long: Option<Vec<u8>>,
}

/// A port IO exit, and the bytes that were written.
pub(crate) struct PortIo {
    vcpu: u32,
    io: Io,
    data: (u64, u32),
}

impl PyIo {
    fn new(question: &PortIo, long: Option<Vec<u8>>) -> Self {
        let io = &question.io;
        Self {
            vcpu: question.vcpu.into(),
            port: io.port.into(),
            write: io.write.into(),
            size: io.size.into(),
            count: io.count.into(),
            data: Data::new(question.data),
            long,
        }
    }
}

impl HookArgument for PyIo {
    type Question = PortIo;

    fn make<'py>(py: Python<'py>, question: &PortIo) -> PyResult<Bound<'py, Self>> {
        Bound::new(py, Self::new(question, None))
    }

    fn set(&self, question: &PortIo) {
        let io = &question.io;
        self.vcpu.set(question.vcpu);
        self.port.set(io.port);
        self.write.set(io.write);
        self.size.set(io.size);
        self.count.set(io.count);
        self.data.set(question.data);
    }

    fn spare() -> &'static LocalKey<Spare<Self>> {
        thread_local! {
            static SPARE: Spare<PyIo> = const { Cell::new(None) };
        }
        &SPARE
    }
}

#[pymethods]
impl PyIo {
    /// The bytes that were written, ``size * count`` of them; empty for a read.
    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        match &self.long {
            Some(long) => PyBytes::new(py, long),
            None => self.data.bytes(py),
        }
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (vcpu, port, size, count) = (self.vcpu.get(), self.port.get(), self.size.get(), self.count.get());
        let (write, data) = (python_bool(self.write.get()), self.data(py).repr()?);
        Ok(format!(
            "Io(vcpu={vcpu}, port={port:#x}, write={write}, size={size}, count={count}, data={data})"
        ))
    }
}

/// One access to an address outside guest memory.
#[pyclass(name = "Mmio", module = "pagegate", frozen)]
pub(crate) struct PyMmio {
    /// Index of the vCPU.
    #[pyo3(get)]
    vcpu: Field<u32>,
    /// The guest-physical address, without the view bit.
    #[pyo3(get)]
    gpa: Field<u64>,
    /// Whether it is a store, not a load.
    #[pyo3(get)]
    write: Field<bool>,
    /// Bytes of the access: 1 to 8.
    #[pyo3(get)]
    size: Field<u8>,
    data: Data,
}

/// An MMIO exit, and the bytes that were stored.
pub(crate) struct DeviceMmio {
    vcpu: u32,
    mmio: Mmio,
    data: (u64, u32),
}

impl HookArgument for PyMmio {
    type Question = DeviceMmio;

    fn make<'py>(py: Python<'py>, question: &DeviceMmio) -> PyResult<Bound<'py, Self>> {
        let mmio = &question.mmio;
        let access = Self {
            vcpu: question.vcpu.into(),
            gpa: mmio.gpa.into(),
            write: mmio.write.into(),
            size: mmio.len.into(),
            data: Data::new(question.data),
        };
        Bound::new(py, access)
    }

    fn set(&self, question: &DeviceMmio) {
        let mmio = &question.mmio;
        self.vcpu.set(question.vcpu);
        self.gpa.set(mmio.gpa);
        self.write.set(mmio.write);
        self.size.set(mmio.len);
        self.data.set(question.data);
    }

    fn spare() -> &'static LocalKey<Spare<Self>> {
        thread_local! {
            static SPARE: Spare<PyMmio> = const { Cell::new(None) };
        }
        &SPARE
    }
}

#[pymethods]
impl PyMmio {
    /// The bytes that were stored; empty for a load.
    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        self.data.bytes(py)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let (vcpu, gpa, size) = (self.vcpu.get(), self.gpa.get(), self.size.get());
        let (write, data) = (python_bool(self.write.get()), self.data(py).repr()?);
        Ok(format!(
            "Mmio(vcpu={vcpu}, gpa={gpa:#x}, write={write}, size={size}, data={data})"
        ))
    }
}

fn python_bool(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}

/// Frees the objects that a thread keeps for calling handlers. Called when the thread ends.
pub(crate) fn forget_accesses(_attached: Python<'_>) {
    reuse::forget::<PyIo>();
    reuse::forget::<PyMmio>();
}

/// A Python callable that answers a port or an MMIO range.
pub(crate) struct Handler(pub(crate) Py<PyAny>);

impl Handler {
    /// TypeError for an object that cannot be called.
    pub(super) fn of(handler: Bound<'_, PyAny>) -> PyResult<Arc<Self>> {
        match handler.is_callable() {
            true => Ok(Arc::new(Self(handler.unbind()))),
            false => Err(PyTypeError::new_err(format!(
                "handler is {}: it must be callable, and take the access",
                call::repr(&handler)?
            ))),
        }
    }
}

/// Copies what a handler returned for a read into `data`. `access` is made only for the message of an error.
fn take<'py>(
    answer: &Bound<'py, PyAny>,
    data: &mut [u8],
    access: impl FnOnce() -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<()> {
    let py = answer.py();
    if let Ok(bytes) = answer.cast_exact::<PyBytes>()
        && bytes.as_bytes().len() == data.len()
    {
        data.copy_from_slice(bytes.as_bytes());
        return Ok(());
    }
    let wrong = |what: String| {
        let len = data.len();
        let access = access()
            .and_then(|access| access.repr())
            .map(|repr| repr.to_string())
            .unwrap_or_default();
        let message = format!("the handler of {access} must return {len} bytes, not {what}");
        errors::policy_error(py, message)
    };
    // No copy of the reference: PyO3 would drop it where another code detaches.
    let copy = answer.cast::<PyByteArray>().map(|bytes| bytes.to_vec());
    let bytes = match (answer.cast::<PyBytes>(), &copy) {
        (Ok(bytes), _) => bytes.as_bytes(),
        (_, Ok(copy)) => copy,
        _ => return Err(wrong(call::repr(answer)?)),
    };
    match bytes.len() == data.len() {
        true => data.copy_from_slice(bytes),
        false => return Err(wrong(bytes.len().to_string())),
    }
    Ok(())
}

impl IoHandler for Handler {
    fn io(&self, vcpu: u32, io: &Io, data: &mut [u8]) -> Result<(), Failure> {
        attached(|py| {
            let handler = self.0.bind(py);
            let written = if io.write { &*data } else { &[] };
            let question = PortIo {
                vcpu,
                io: *io,
                data: Data::of(written),
            };
            let answer = match written.len() > WORD {
                true => {
                    let access = Bound::new(py, PyIo::new(&question, Some(written.to_vec())))?;
                    call::call(handler, access.as_any())?
                }
                false => reuse::call::<PyIo>(handler, &question)?,
            };
            match io.write {
                true => Ok(()),
                false => take(&answer, data, || Ok(PyIo::make(py, &question)?.into_any())),
            }
        })
    }
}

impl MmioHandler for Handler {
    fn mmio(&self, vcpu: u32, mmio: &Mmio, data: &mut [u8]) -> Result<(), Failure> {
        attached(|py| {
            let question = DeviceMmio {
                vcpu,
                mmio: *mmio,
                data: Data::of(if mmio.write { data } else { &[] }),
            };
            let answer = reuse::call::<PyMmio>(self.0.bind(py), &question)?;
            match mmio.write {
                true => Ok(()),
                false => take(&answer, data, || Ok(PyMmio::make(py, &question)?.into_any())),
            }
        })
    }
}
