//! A device of Rust at which a guest says where it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use pagegate_core::devices::bus::IoHandler;
use pagegate_core::error::Failure;
use pagegate_core::hypervisor::exit::Io;
use parking_lot::Mutex;
use pyo3::prelude::*;

/// What was written, when, and by which vCPU.
type Mark = (u32, u8, u64);

pub(crate) struct Marks {
    born: Instant,
    written: Mutex<Vec<Mark>>,
    count: AtomicU32,
}

/// A port for ``Vm.on_io`` that notes when it is written, without entering Python.
///
/// Read, it answers how often that was.
#[pyclass(name = "Marks", module = "pagegate._core", frozen)]
pub(crate) struct PyMarks(pub(crate) Arc<Marks>);

#[pymethods]
impl PyMarks {
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

    /// Each as ``(vcpu, value, nanoseconds)``, the time since this object was made.
    #[getter]
    fn written(&self) -> Vec<Mark> {
        self.0.written.lock().clone()
    }
}

impl Marks {
    /// Whatever is not the answer of a byte.
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
