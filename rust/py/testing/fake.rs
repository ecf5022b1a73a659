//! The fake hypervisor, for tests of machines and policies without KVM.

use std::sync::Arc;

use pagegate_core::hypervisor::fake::{CallName, FakeVm, Injection, Reply, Step};
use pagegate_core::hypervisor::vm::Hypervisor;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::interpreter::arguments::{self, named};
use crate::interpreter::sizes;

/// One step of a script: what a vCPU of a Fake does next.
#[pyclass(name = "Step", module = "pagegate.testing", frozen, from_py_object)]
#[derive(Clone)]
pub(crate) struct PyStep(Step);

#[pymethods]
impl PyStep {
    /// KVM_RUN fails with ``errno`` and does not write kvm_run.
    #[staticmethod]
    fn fail(#[pyo3(from_py_with = arguments::integer::<named::errno, _>)] errno: i32) -> Self {
        Self(Step::Fail(errno))
    }

    /// KVM_RUN ends with this exit_reason, these first words of kvm_run's union, and this errno (0: success).
    #[staticmethod]
    #[pyo3(signature = (reason, words = (0, 0, 0), *, errno = 0), text_signature = "(reason, words=(0, 0, 0), *, errno=0)")]
    fn exit(
        #[pyo3(from_py_with = arguments::integer::<named::reason, _>)] reason: u32,
        words: (u64, u64, u64),
        #[pyo3(from_py_with = arguments::integer::<named::errno, _>)] errno: i32,
    ) -> Self {
        Self(Step::Exit {
            errno,
            reason,
            words: [words.0, words.1, words.2],
        })
    }

    /// KVM_EXIT_MEMORY_FAULT, once, whatever state the page is in.
    #[staticmethod]
    #[pyo3(signature = (gpa, *, flags = 8, size = 4096, errno = 14))]
    fn memory_fault(
        #[pyo3(from_py_with = sizes::size::<named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = arguments::integer::<named::flags, _>)] flags: u64,
        #[pyo3(from_py_with = sizes::size::<named::size, _>)] size: u64,
        #[pyo3(from_py_with = arguments::integer::<named::errno, _>)] errno: i32,
    ) -> Self {
        Self(Step::Exit {
            errno,
            reason: pagegate_core::hypervisor::exit::MEMORY_FAULT,
            words: [flags, gpa, size],
        })
    }

    /// An access that faults or not as the slots and attributes have it; it is executed again after a fault.
    #[staticmethod]
    #[pyo3(signature = (gpa, *, write = false))]
    fn access(
        #[pyo3(from_py_with = sizes::size::<named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = arguments::flag::<named::write>)] write: bool,
    ) -> Self {
        Self(Step::Access { gpa, write })
    }

    /// KVM_EXIT_HYPERCALL. Reply: RAX.
    #[staticmethod]
    #[pyo3(signature = (gpa, pages, attributes, *, nr = 12))]
    fn hypercall(
        #[pyo3(from_py_with = sizes::size::<named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = arguments::integer::<named::pages, _>)] pages: u64,
        #[pyo3(from_py_with = arguments::integer::<named::attributes, _>)] attributes: u64,
        #[pyo3(from_py_with = arguments::integer::<named::nr, _>)] nr: u64,
    ) -> Self {
        Self(Step::Hypercall([nr, gpa, pages, attributes]))
    }

    /// The same request by the doorbell. Reply: RAX.
    #[staticmethod]
    #[pyo3(signature = (gpa, pages, attributes, *, nr = 12))]
    fn doorbell(
        #[pyo3(from_py_with = sizes::size::<named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = arguments::integer::<named::pages, _>)] pages: u64,
        #[pyo3(from_py_with = arguments::integer::<named::attributes, _>)] attributes: u64,
        #[pyo3(from_py_with = arguments::integer::<named::nr, _>)] nr: u64,
    ) -> Self {
        Self(Step::Doorbell([nr, gpa, pages, attributes]))
    }

    /// OUT, or OUTS if ``data`` is more than ``size`` bytes.
    #[staticmethod]
    #[pyo3(signature = (port, data, *, size = 1))]
    fn io_write(
        #[pyo3(from_py_with = arguments::integer::<named::port, _>)] port: u16,
        #[pyo3(from_py_with = arguments::byte_values::<named::data>)] data: Vec<u8>,
        #[pyo3(from_py_with = arguments::integer::<Width, _>)] size: u8,
    ) -> PyResult<Self> {
        io(port, true, size, data)
    }

    /// IN, or INS if ``count`` is above 1. Reply: the data.
    #[staticmethod]
    #[pyo3(signature = (port, *, size = 1, count = 1))]
    fn io_read(
        #[pyo3(from_py_with = arguments::integer::<named::port, _>)] port: u16,
        #[pyo3(from_py_with = arguments::integer::<Width, _>)] size: u8,
        #[pyo3(from_py_with = arguments::integer::<named::count, _>)] count: usize,
    ) -> PyResult<Self> {
        io(
            port,
            false,
            size,
            vec![0; usize::from(size).saturating_mul(count).min(MAX_IO + 1)],
        )
    }

    /// RDMSR of an MSR that KVM leaves to user space. Reply: a byte, 1 for #GP, and the eight that were read.
    #[staticmethod]
    fn read_msr(#[pyo3(from_py_with = arguments::integer::<named::index, _>)] index: u32) -> Self {
        Self(Step::ReadMsr(index))
    }

    /// WRMSR to such an MSR. Reply: a byte, 1 for #GP.
    #[staticmethod]
    fn write_msr(
        #[pyo3(from_py_with = arguments::integer::<named::index, _>)] index: u32,
        #[pyo3(from_py_with = arguments::integer::<named::data, _>)] data: u64,
    ) -> Self {
        Self(Step::WriteMsr { index, data })
    }

    /// KVM_RUN does not return until the vCPU is kicked.
    #[staticmethod]
    fn block() -> Self {
        Self(Step::Block)
    }

    /// HLT.
    #[staticmethod]
    fn halt() -> Self {
        Self(Step::Halt)
    }

    /// A triple fault: KVM_EXIT_SHUTDOWN.
    #[staticmethod]
    fn shutdown() -> Self {
        Self(Step::Shutdown)
    }

    /// KVM_EXIT_INTERNAL_ERROR.
    #[staticmethod]
    fn internal_error(#[pyo3(from_py_with = arguments::integer::<named::suberror, _>)] suberror: u32) -> Self {
        Self(Step::InternalError(suberror))
    }

    fn __repr__(&self) -> String {
        format!("Step.{:?}", self.0)
    }
}

const MAX_IO: usize = 4096;

/// The ``size`` of port IO, which is no number of bytes for which "4K" would do.
struct Width;

impl arguments::Named for Width {
    const NAME: &'static str = "size";
    const SUCH_AS: &'static str = "1, 2 or 4";
}

fn io(port: u16, write: bool, size: u8, data: Vec<u8>) -> PyResult<PyStep> {
    if !matches!(size, 1 | 2 | 4) || data.is_empty() || data.len() > MAX_IO || !data.len().is_multiple_of(size.into()) {
        let message = format!("IO is 1, 2 or 4 bytes at a time and at most {MAX_IO} in all");
        return Err(PyValueError::new_err(message));
    }
    Ok(PyStep(Step::Io {
        port,
        write,
        size,
        data,
    }))
}

/// What a vCPU of a Fake got as the answer to a step.
#[pyclass(name = "Reply", module = "pagegate.testing", frozen)]
pub(crate) struct PyReply(Reply);

#[pymethods]
impl PyReply {
    /// Index of the step.
    #[getter]
    fn step(&self) -> usize {
        self.0.step
    }

    /// The bytes: RAX, or the data that was read.
    #[getter]
    fn data<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.value)
    }

    /// ``data`` as a signed integer if it is eight bytes, else ``None``.
    #[getter]
    fn value(&self) -> Option<i64> {
        Some(i64::from_le_bytes(self.0.value.as_slice().try_into().ok()?))
    }

    fn __repr__(&self) -> String {
        format!("Reply(step={}, data={:x?})", self.0.step, self.0.value)
    }
}

/// A hypervisor without KVM: each vCPU executes its script ``cycles`` times, then halts.
///
/// ``private_memory``: whether it acts as a host with private memory. ``memslots``: how many a VM can have.
#[pyclass(name = "Fake", module = "pagegate.testing", frozen)]
pub(crate) struct PyFake(Arc<FakeVm>);

impl PyFake {
    pub(crate) fn vm(&self) -> Arc<dyn Hypervisor> {
        self.0.clone()
    }
}

fn call(name: &str) -> PyResult<CallName> {
    let calls = [
        ("set_attributes", CallName::SetAttributes),
        ("create_memslot", CallName::CreateMemslot),
        ("delete_memslot", CallName::DeleteMemslot),
        ("discard", CallName::Discard),
        ("pre_fault", CallName::PreFault),
        ("other", CallName::Other),
        ("any", CallName::Any),
    ];
    arguments::choose(name, "call", calls)
}

#[pymethods]
impl PyFake {
    fn __repr__(&self) -> String {
        format!("<pagegate.testing.Fake with {} memslots>", self.0.slot_count())
    }

    #[new]
    #[pyo3(signature = (*scripts, private_memory = true, memslots = 32764, cycles = 1))]
    fn new(
        scripts: Vec<Vec<PyStep>>,
        #[pyo3(from_py_with = arguments::flag::<named::private_memory>)] private_memory: bool,
        #[pyo3(from_py_with = arguments::integer::<named::memslots, _>)] memslots: u32,
        #[pyo3(from_py_with = arguments::integer::<named::cycles, _>)] cycles: u64,
    ) -> Self {
        let capabilities = match private_memory {
            true => FakeVm::protected(memslots),
            false => FakeVm::plain(memslots),
        };
        let steps = |script: Vec<PyStep>| script.into_iter().map(|step| step.0).collect();
        Self(Arc::new(FakeVm::new(
            capabilities,
            scripts.into_iter().map(steps).collect(),
            cycles,
        )))
    }

    /// Makes a call fail with ``errno``, after ``after`` more calls that succeed.
    ///
    /// ``call``: "other" are those without a name here, which create vCPUs, guest_memfds and interrupt controllers, or
    /// read and set a vCPU's state; "any" counts all together. KVM_RUN is none of them: see ``Step.fail``.
    /// ``forever``: all later ones fail too. ``half_done``: before it fails it does its work on the first half of its
    /// range.
    #[pyo3(signature = (call, errno, *, after = 0, half_done = false, forever = false))]
    fn inject(
        &self,
        #[pyo3(from_py_with = arguments::text::<named::call>)] call: String,
        #[pyo3(from_py_with = arguments::integer::<named::errno, _>)] errno: i32,
        #[pyo3(from_py_with = arguments::integer::<named::after, _>)] after: u64,
        #[pyo3(from_py_with = arguments::flag::<named::half_done>)] half_done: bool,
        #[pyo3(from_py_with = arguments::flag::<named::forever>)] forever: bool,
    ) -> PyResult<()> {
        self.0.inject(Injection {
            call: self::call(&call)?,
            after,
            errno,
            half_done,
            forever,
        });
        Ok(())
    }

    /// The answers that a vCPU got so far; none are kept if ``cycles`` is above 1.
    #[pyo3(signature = (vcpu = 0))]
    fn replies(&self, #[pyo3(from_py_with = arguments::integer::<named::vcpu, _>)] vcpu: usize) -> Vec<PyReply> {
        self.0.replies(vcpu).into_iter().map(PyReply).collect()
    }

    /// Whether the page at ``gpa`` has the attribute PRIVATE.
    fn is_private(&self, #[pyo3(from_py_with = sizes::size::<named::gpa, _>)] gpa: u64) -> bool {
        self.0.is_private(gpa)
    }

    /// Whether the memslot at ``gpa`` has a guest_memfd; ``None`` if there is no memslot.
    fn slot_at(&self, #[pyo3(from_py_with = sizes::size::<named::gpa, _>)] gpa: u64) -> Option<bool> {
        self.0.slot_at(gpa)
    }

    /// How many memslots there are.
    #[getter]
    fn slots(&self) -> usize {
        self.0.slot_count()
    }

    /// How many calls of this kind were made.
    fn calls(&self, #[pyo3(from_py_with = arguments::text::<named::call>)] call: String) -> PyResult<u64> {
        Ok(self.0.calls(self::call(&call)?))
    }
}
