//! One vCPU.

use pagegate_core::boot::start::CpuMode;
use pagegate_core::x86::registers::{self, REGISTERS, SYSTEM_REGISTERS};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyo3::{PyTraverseError, PyVisit};

use super::parts::OfVm;
use crate::interpreter::{arguments, attach, errors};

/// One vCPU of a machine.
#[pyclass(name = "Vcpu", module = "pagegate", frozen)]
pub(crate) struct PyVcpu {
    pub(super) vm: OfVm,
    /// Its number, from 0.
    #[pyo3(get)]
    pub(super) index: usize,
}

#[pymethods]
impl PyVcpu {
    /// Sets all registers for the next run.
    ///
    /// ``registers``: any general register; cr0, cr2, cr3, cr4, cr8, efer, fs_base, gs_base; and segment registers, by
    /// selector. General registers that are not named are 0, except ``rsp`` in mode "long": each vCPU has a page of
    /// stack below the page tables.
    ///
    /// "real": 16 bits, segments at 0. "protected": 32 bits, flat segments, no paging. "long": 64 bits, ring 0, all of
    /// memory identity-mapped in each view, by tables at the top of memory, which become shared: six pages for up to a
    /// GiB. There is no IDT: an exception ends the run as "shutdown".
    ///
    /// With two views, ``rip`` is moved to the shared view if its page is shared, because an instruction can be fetched
    /// only through the view of the page's state.
    ///
    /// Raises TypeError for a register that does not exist, ValueError for a value that does not fit, NotSupported for
    /// a view bit that mode "long" cannot map, PagegateError while the vCPU runs.
    #[pyo3(signature = (*, mode = None, **registers), text_signature = "($self, *, mode='long', **registers)")]
    fn start(
        &self,
        py: Python<'_>,
        mode: Option<&Bound<'_, PyAny>>,
        registers: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<()> {
        let modes = [
            ("real", CpuMode::Real),
            ("protected", CpuMode::Protected),
            ("long", CpuMode::Long),
        ];
        let mode = match mode {
            Some(mode) => arguments::choose(&arguments::word(mode)?, "mode", modes)?,
            None => CpuMode::Long,
        };
        let given: Vec<(String, u64)> = match registers {
            Some(registers) => registers.iter().map(register).collect::<PyResult<_>>()?,
            None => Vec::new(),
        };
        let machine = self.vm.machine(py)?;
        py.detach(|| machine.start(self.index, mode, &given, &mut attach::check_signals))
            .map_err(|error| errors::raise(py, error))
    }

    /// The general registers by name. PagegateError while the vCPU runs.
    fn regs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let machine = self.vm.machine(py)?;
        let mut regs = machine.regs(self.index).map_err(|error| errors::raise(py, error))?;
        let dict = PyDict::new(py);
        for name in REGISTERS {
            dict.set_item(name, registers::register(&mut regs, name).copied())?;
        }
        Ok(dict)
    }

    /// The control registers, EFER and the bases of FS and GS by name. PagegateError while the vCPU runs.
    fn sregs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let machine = self.vm.machine(py)?;
        let mut sregs = machine.sregs(self.index).map_err(|error| errors::raise(py, error))?;
        let dict = PyDict::new(py);
        for name in SYSTEM_REGISTERS {
            if let Some(value) = registers::system_register(&mut sregs, name) {
                dict.set_item(name, *value)?;
            }
        }
        Ok(dict)
    }

    fn __repr__(&self) -> String {
        format!("<pagegate.Vcpu {}>", self.index)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.vm.traverse(&visit)
    }
}

fn register((name, value): (Bound<'_, PyAny>, Bound<'_, PyAny>)) -> PyResult<(String, u64)> {
    let name: String = name.extract()?;
    let known: Vec<&str> = REGISTERS.into_iter().chain(SYSTEM_REGISTERS).collect();
    if !known.contains(&name.as_str()) {
        let known = known.join(", ");
        return Err(PyTypeError::new_err(format!(
            "there is no register {name:?}; there are {known}"
        )));
    }
    let value = arguments::integer_named(&value, &name, "", "")?;
    Ok((name, value))
}
