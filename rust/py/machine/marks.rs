//! A port at which a guest marks the beginning and the end of what is measured.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use pagegate_core::devices::bus::IoHandler;
use pagegate_core::error::Failure;
use pagegate_core::hypervisor::exit::Io;
use parking_lot::Mutex;
use pyo3::prelude::*;

/// A write to the port: the vCPU, the byte, and nanoseconds since `born`.
type Mark = (u32, u8, u64);

pub(crate) struct Marks {
    born: Instant,
    written: Mutex<Vec<Mark>>,
    count: AtomicU32,
}

/// A handler for ``Vm.on_io`` that notes each write to its port, without entering Python.
///
/// A read of the port returns how many writes there were.
#[pyclass(name = "Marks", module = "pagegate._core", frozen)]
pub(crate) struct PyMarks(pub(crate) Arc<Marks>);

#[pymethods]
impl PyMarks {
    fn __repr__(&self) -> String {
        format!("<pagegate.Marks: {} writes>", self.0.count.load(Ordering::Relaxed))
    }

    #[new]
    fn new() -> Self {
        Self(Arc::new(Marks {
            born: Instant::now(),
            written: Mutex::default(),
            count: AtomicU32::new(0),
        }))
    }

    /// Nanoseconds since this object was made.
    #[getter]
    fn now(&self) -> u64 {
        self.0.born.elapsed().as_nanos() as u64
    }

    /// The writes so far: ``(vcpu, value, nanoseconds)``, timed from when this object was made.
    #[getter]
    fn written(&self) -> Vec<Mark> {
        self.0.written.lock().clone()
    }
}

impl Marks {
    /// All accesses but a read of one byte, which is the frequent one.
    #[cold]
    fn other(&self, vcpu: u32, io: &Io, data: &mut [u8]) {
        match (io.write, data.first()) {
            (true, Some(value)) => {
                let time = self.born.elapsed().as_nanos() as u64;
                self.count.fetch_add(1, Ordering::Relaxed);
                self.written.lock().push((vcpu, *value, time));
            }
            _ => {
                let count = self.count.load(Ordering::Relaxed).to_le_bytes();
                for (place, byte) in data.iter_mut().enumerate() {
                    *byte = count.get(place).copied().unwrap_or_default();
                }
            }
        }
    }
}

impl IoHandler for Marks {
    fn io(&self, vcpu: u32, io: &Io, data: &mut [u8]) -> Result<(), Failure> {
        match data {
            [byte] if !io.write => *byte = self.count.load(Ordering::Relaxed) as u8,
            data => self.other(vcpu, io, data),
        }
        Ok(())
    }
}
