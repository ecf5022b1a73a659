//! Machines that are put aside, and go on.

use std::path::Path;

use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::snapshot::resume::{Bytes, Snapshot};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::parts::Parts;
use crate::devices::builtin;
use crate::interpreter::{attach, errors};

/// Writes a machine to a folder.
pub(super) fn save(py: Python<'_>, machine: &Machine, folder: &Path) -> PyResult<()> {
    let saved = py.detach(|| machine.snapshot(folder, &mut attach::check_signals));
    saved.map_err(|error| errors::raise(py, error))
}

/// Puts a machine back to what a folder has.
pub(super) fn reset(py: Python<'_>, machine: &Machine, folder: &Path) -> PyResult<()> {
    let opened = open(py, folder)?;
    let done = py.detach(|| machine.reset_to(opened, &mut attach::check_signals));
    done.map_err(|error| errors::raise(py, error))
}

/// Reads what a folder has besides memory.
pub(super) fn open(py: Python<'_>, folder: &Path) -> PyResult<Snapshot> {
    let opened = py.detach(|| Snapshot::open(folder, &mut attach::check_signals));
    opened.map_err(|error| errors::raise(py, error))
}

/// Has a machine that was just made go on from a snapshot.
pub(super) fn resume(
    vm: &Bound<'_, PyAny>,
    parts: &Parts,
    snapshot: Snapshot,
    devices: &[Bound<'_, PyAny>],
    bytes: Bytes,
) -> PyResult<()> {
    let py = vm.py();
    let machine = parts.machine(py)?;
    let told: Vec<(String, bool)> = snapshot
        .devices()
        .into_iter()
        .map(|(name, _, logs_accesses)| (name.to_owned(), logs_accesses))
        .collect();
    if told.len() != devices.len() {
        let names: Vec<&str> = told.iter().map(|(name, _)| name.as_str()).collect();
        return Err(PyValueError::new_err(format!(
            "devices has {}, and the snapshot has {}: {}",
            devices.len(),
            names.len(),
            if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            }
        )));
    }
    for (device, (name, logs_accesses)) in devices.iter().zip(&told) {
        if let Some(device) = builtin::add(vm, &machine, device, Some(name), *logs_accesses)? {
            parts.keep_device(device);
        }
    }
    let resumed = py.detach(|| machine.resume(snapshot, bytes, &mut attach::check_signals));
    resumed.map_err(|error| errors::raise(py, error))?;
    parts.is_new(&machine);
    Ok(())
}
