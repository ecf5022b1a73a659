//! Who asks: the registers of the vCPU whose request a hook is called with, read when the hook looks at them.

use kvm_bindings::kvm_regs;
use pagegate_core::error::{Error, Failure};
use pagegate_core::vcpu::asker::{Asker, asker};
use pyo3::exceptions::PyAttributeError;
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::interpreter::attach::attached;
use crate::interpreter::{errors, judged, overdue};

/// The general registers of the vCPU that made `request`.
pub(super) fn regs<T>(request: &Bound<'_, T>) -> PyResult<PyRegisters> {
    let asker = asker_of(request)?;
    let regs = request.py().detach(|| asker.regs());
    let failed = |errno| errors::busy(request.py(), &format!("the vCPU's registers cannot be read: {errno}"));
    Ok(regs.map_err(failed)?.into())
}

/// The function that it is in.
pub(super) fn symbol<T>(request: &Bound<'_, T>) -> PyResult<Option<String>> {
    let asker = asker_of(request)?;
    let symbol = request.py().detach(|| asker.symbol(&mut in_time));
    symbol.map_err(|failure| errors::raise(request.py(), Error::Interrupted(failure)))
}

/// The instruction that it is at.
pub(super) fn disassembly<T>(request: &Bound<'_, T>) -> PyResult<Option<String>> {
    let asker = asker_of(request)?;
    let instruction = request.py().detach(|| asker.instruction(&mut in_time));
    instruction.map_err(|failure| errors::raise(request.py(), Error::Interrupted(failure)))
}

/// Fails if the call has taken longer than `policy_timeout`.
fn in_time() -> Result<(), Failure> {
    match overdue::is_raised() {
        true => attached(|py| Err(PyErr::from_type(errors::policy_timeout(py)?.cast_into::<PyType>()?, ()))),
        false => Ok(()),
    }
}

/// The vCPU that made `request`. AttributeError outside of the hook that was called with it.
fn asker_of<T>(request: &Bound<'_, T>) -> PyResult<Asker> {
    asker().filter(|_| judged::is(request)).ok_or_else(|| {
        PyAttributeError::new_err(
            "the vCPU can be looked at only in the hook that is called with its request, and in the hook's own thread",
        )
    })
}

/// The general registers of a vCPU at one exit.
#[pyclass(name = "Registers", module = "pagegate", frozen, get_all)]
pub(crate) struct PyRegisters {
    rax: u64,
    rbx: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    rsp: u64,
    rbp: u64,
    r8: u64,
    r9: u64,
    r10: u64,
    r11: u64,
    r12: u64,
    r13: u64,
    r14: u64,
    r15: u64,
    pub(super) rip: u64,
    rflags: u64,
}

impl From<kvm_regs> for PyRegisters {
    fn from(regs: kvm_regs) -> Self {
        Self {
            rax: regs.rax,
            rbx: regs.rbx,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            rsp: regs.rsp,
            rbp: regs.rbp,
            r8: regs.r8,
            r9: regs.r9,
            r10: regs.r10,
            r11: regs.r11,
            r12: regs.r12,
            r13: regs.r13,
            r14: regs.r14,
            r15: regs.r15,
            rip: regs.rip,
            rflags: regs.rflags,
        }
    }
}

#[pymethods]
impl PyRegisters {
    fn __repr__(&self) -> String {
        format!(
            "Registers(rip={:#x}, rsp={:#x}, rax={:#x}, rbx={:#x}, rcx={:#x}, rdx={:#x}, rsi={:#x}, rdi={:#x}, ...)",
            self.rip, self.rsp, self.rax, self.rbx, self.rcx, self.rdx, self.rsi, self.rdi
        )
    }
}
