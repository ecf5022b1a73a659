//! Virtio devices in Python.

use std::sync::Arc;

use pagegate_core::devices::virtio::device::Device;
use pagegate_core::devices::virtio::queue::Queue;
use pagegate_core::error::Failure;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use pyo3::{PyTraverseError, PyVisit};

use super::request::{PyDeviceQueue, Turn};
use crate::interpreter::attach::attached;
use crate::interpreter::{call, errors};

/// A Python object that is a device, with what was looked up once.
pub(crate) struct PyDevice {
    object: Py<PyAny>,
    id: u16,
    features: u64,
    queues: Vec<u16>,
    process: Py<PyAny>,
    write_config: Option<Py<PyAny>>,
    reset: Option<Py<PyAny>>,
    save: Option<Py<PyAny>>,
    restore: Option<Py<PyAny>>,
}

impl PyDevice {
    /// Reads a device's attributes and finds its methods.
    pub(super) fn resolve(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let resolve = object.py().import("pagegate.devices")?.getattr("_resolve")?;
        let (id, features, queues, process, write_config, reset, save, restore) =
            call::call(&resolve, object)?.extract()?;
        Ok(Self {
            object: object.clone().unbind(),
            id,
            features,
            queues,
            process,
            write_config,
            reset,
            save,
            restore,
        })
    }

    pub(crate) fn object(&self) -> &Py<PyAny> {
        &self.object
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.object)?;
        visit.call(&self.process)?;
        let others = [&self.write_config, &self.reset, &self.save, &self.restore];
        others.into_iter().flatten().try_for_each(|method| visit.call(method))
    }
}

impl Device for PyDevice {
    fn id(&self) -> u16 {
        self.id
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    fn config(&self) -> Result<Vec<u8>, Failure> {
        attached(|py| {
            let config = py.import("pagegate.devices")?.getattr("_config")?;
            call::call(&config, self.object.bind(py))?.extract()
        })
    }

    fn write_config(&self, offset: usize, from: &[u8]) -> Result<(), Failure> {
        let Some(method) = &self.write_config else {
            return Ok(());
        };
        attached(|py| {
            let written = (offset, PyBytes::new(py, from)).into_pyobject(py)?;
            call::call(method.bind(py), written.as_any()).map(drop)
        })
    }

    /// Requests that are not completed when it returns are completed with nothing written. So is one whose bytes could not
    /// be accessed, where the device does not catch that.
    fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure> {
        let turn = Arc::new(Turn::new(std::mem::take(queues), index));
        let told = attached(|py| {
            let queue = Bound::new(py, PyDeviceQueue::of(&turn))?;
            match call::call(self.process.bind(py), queue.as_any()) {
                Err(error) if errors::is_device_access(py, &error) => {
                    call::forget(py, error);
                    Ok(())
                }
                answer => answer.map(drop),
            }
        });
        *queues = turn.end();
        told
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        match &self.save {
            Some(method) => attached(|py| call::call_alone(method.bind(py))?.extract()),
            None => Ok(Vec::new()),
        }
    }

    fn restore(&self, state: &[u8]) -> Result<(), Failure> {
        match &self.restore {
            Some(method) => attached(|py| call::call(method.bind(py), &PyBytes::new(py, state)).map(drop)),
            None => Ok(()),
        }
    }

    fn reset(&self) -> Result<(), Failure> {
        match &self.reset {
            Some(method) => attached(|py| call::call_alone(method.bind(py)).map(drop)),
            None => Ok(()),
        }
    }
}
