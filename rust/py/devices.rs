//! Python handlers for port IO and MMIO.

use pagegate_core::decode::{Io, Mmio};
use pagegate_core::devices::{IoHandler, MmioHandler};
use pagegate_core::error::Failure;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::PyBytes;

use crate::errors;

/// One port IO exit. String IO keeps its access size and count.
#[pyclass(name = "Io", module = "pagegate", frozen, get_all)]
pub(crate) struct PyIo {
    vcpu: u32,
    port: u16,
    /// OUT, not IN.
    write: bool,
    /// Bytes of one access: 1, 2 or 4.
    size: u8,
    /// Accesses.
    count: u32,
    /// What was written, ``size * count`` bytes; empty for a read.
    data: Py<PyBytes>,
}

#[pymethods]
impl PyIo {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let Self {
            vcpu,
            port,
            size,
            count,
            ..
        } = self;
        let (write, data) = (python_bool(self.write), self.data.bind(py).repr()?);
        Ok(format!(
            "Io(vcpu={vcpu}, port={port:#x}, write={write}, size={size}, count={count}, data={data})"
        ))
    }
}

/// One access to an address outside memory.
#[pyclass(name = "Mmio", module = "pagegate", frozen, get_all)]
pub(crate) struct PyMmio {
    vcpu: u32,
    gpa: u64,
    /// A store, not a load.
    write: bool,
    /// Bytes, 1 to 8.
    size: u8,
    /// What was stored; empty for a load.
    data: Py<PyBytes>,
}

#[pymethods]
impl PyMmio {
    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let Self { vcpu, gpa, size, .. } = self;
        let (write, data) = (python_bool(self.write), self.data.bind(py).repr()?);
        Ok(format!(
            "Mmio(vcpu={vcpu}, gpa={gpa:#x}, write={write}, size={size}, data={data})"
        ))
    }
}

fn python_bool(value: bool) -> &'static str {
    if value { "True" } else { "False" }
}

/// A Python callable that answers accesses.
pub(crate) struct Handler(pub(crate) Py<PyAny>);

impl Handler {
    fn answer<'py>(&self, access: Bound<'py, PyAny>, write: bool, data: &mut [u8]) -> PyResult<()> {
        let py = access.py();
        let answer = self.0.bind(py).call1((&access,))?;
        if write {
            return Ok(());
        }
        let wrong = |what: String| {
            let len = data.len();
            let access = access.repr().map(|repr| repr.to_string()).unwrap_or_default();
            errors::policy_error(
                py,
                format!("the handler of {access} must return {len} bytes, not {what}"),
            )
        };
        match answer.extract::<PyBackedBytes>() {
            Ok(bytes) if bytes.len() == data.len() => data.copy_from_slice(&bytes),
            Ok(bytes) => return Err(wrong(bytes.len().to_string())),
            Err(_) => return Err(wrong(answer.repr()?.to_string())),
        }
        Ok(())
    }
}

impl IoHandler for Handler {
    fn io(&self, vcpu: u32, io: &Io, data: &mut [u8]) -> Result<(), Failure> {
        Python::attach(|py| {
            let access = PyIo {
                vcpu,
                port: io.port,
                write: io.write,
                size: io.size,
                count: io.count,
                data: PyBytes::new(py, if io.write { data } else { &[] }).unbind(),
            };
            self.answer(Bound::new(py, access)?.into_any(), io.write, data)
        })
        .map_err(errors::failure)
    }
}

impl MmioHandler for Handler {
    fn mmio(&self, vcpu: u32, mmio: &Mmio, data: &mut [u8]) -> Result<(), Failure> {
        Python::attach(|py| {
            let access = PyMmio {
                vcpu,
                gpa: mmio.gpa,
                write: mmio.write,
                size: mmio.len,
                data: PyBytes::new(py, if mmio.write { data } else { &[] }).unbind(),
            };
            self.answer(Bound::new(py, access)?.into_any(), mmio.write, data)
        })
        .map_err(errors::failure)
    }
}
