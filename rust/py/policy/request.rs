//! The requests that hooks are called with.

use std::cell::Cell;
use std::thread::LocalKey;

use pagegate_core::errno::{EFAULT, EHWPOISON, Errno};
use pagegate_core::hypervisor::exit::FLAG_PRIVATE;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::memory::views::Views;
use pagegate_core::policy::map_gpa_range;
use pagegate_core::policy::request::{ExplicitRequest, ImplicitRequest};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::asker::{self, PyRegisters};
use crate::interpreter::fields::{Field, RangeState};
use crate::interpreter::reuse::{HookArgument, Spare};
use crate::interpreter::{arguments, sizes};

/// Checks the pages of a request made in Python; the core makes only valid ones.
fn pages(gpa: u64, size: u64) -> PyResult<Range> {
    Range::new(gpa, size).ok_or_else(|| {
        PyValueError::new_err(format!(
            "gpa {gpa:#x} and size {size:#x} must be multiples of {PAGE_SIZE}, size above 0, and their sum below 2^64"
        ))
    })
}

fn positive(errno: i32) -> PyResult<Errno> {
    match errno {
        1..=4095 => Ok(Errno(errno)),
        _ => Err(PyValueError::new_err(format!(
            "errno is {errno}: it must be in 1..=4095"
        ))),
    }
}

fn accessed(private: bool) -> State {
    match private {
        true => State::Private,
        false => State::Shared,
    }
}

/// An implicit request: the guest accessed a page that is not in the accessed state.
///
/// KVM reports it by KVM_EXIT_MEMORY_FAULT (attributes, traps) or KVM_EXIT_MMIO (memslots).
///
/// One can be made to test a policy: ``flags`` are by default those of the access, ``state`` is the opposite of the
/// accessed state. ``gpa`` and ``size`` are in bytes, multiples of 4096; ``errno`` is in 1..=4095. Raises ValueError.
#[pyclass(name = "MemoryFault", module = "pagegate", frozen, get_all, subclass)]
pub(crate) struct PyMemoryFault {
    /// Index of the vCPU.
    vcpu: Field<u32>,
    /// The page's address in bytes, without the view bit.
    gpa: Field<u64>,
    /// Bytes: 4096 on x86.
    size: Field<u64>,
    /// Whether the access was one to private memory, else to shared.
    ///
    /// With two views: whether it was through the private view. With one: what KVM's PRIVATE flag says.
    private: Field<bool>,
    /// KVM_MEMORY_EXIT_FLAG_*, as KVM reports them or, with memslots, as it would; PRIVATE is 8.
    flags: Field<u64>,
    /// EFAULT (14); EHWPOISON (133) for a poisoned page.
    errno: Field<i32>,
    /// The page's present state.
    state: Field<RangeState>,
    /// The guest's instruction pointer: of the instruction that accessed the page, unless ``executed``.
    rip: Field<u64>,
    /// Whether KVM has executed the instruction up to this access: under memslots, of a store, a push or a call.
    ///
    /// ``rip`` and ``regs`` are then as the instruction leaves them, such as the next one's or a call's target. Nothing
    /// tells where it began: the same store with a prefix and without leaves the same registers.
    executed: Field<bool>,
    /// How often this same fault came before, in a row, with no change of its page; 0 for the first one.
    repeats: Field<u32>,
    /// When the vCPU exited: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``.
    time: Field<u64>,
}

impl From<&ImplicitRequest> for PyMemoryFault {
    fn from(fault: &ImplicitRequest) -> Self {
        Self {
            vcpu: fault.vcpu.into(),
            gpa: fault.range.gpa().into(),
            size: fault.range.size().into(),
            private: (fault.access == State::Private).into(),
            flags: fault.flags.into(),
            errno: fault.errno.0.into(),
            state: RangeState::from(fault.state).into(),
            rip: fault.rip.into(),
            executed: fault.executed.into(),
            repeats: fault.repeats.into(),
            time: fault.time.into(),
        }
    }
}

impl HookArgument for PyMemoryFault {
    type Question = ImplicitRequest;

    fn make<'py>(py: Python<'py>, fault: &ImplicitRequest) -> PyResult<Bound<'py, Self>> {
        Bound::new(py, Self::from(fault))
    }

    fn set(&self, fault: &ImplicitRequest) {
        self.vcpu.set(fault.vcpu);
        self.gpa.set(fault.range.gpa());
        self.size.set(fault.range.size());
        self.private.set(fault.access == State::Private);
        self.flags.set(fault.flags);
        self.errno.set(fault.errno.0);
        self.state.set(fault.state.into());
        self.rip.set(fault.rip);
        self.executed.set(fault.executed);
        self.repeats.set(fault.repeats);
        self.time.set(fault.time);
    }

    fn spare() -> &'static LocalKey<Spare<Self>> {
        thread_local!(static SPARE: Spare<PyMemoryFault> = const { Cell::new(None) });
        &SPARE
    }
}

impl PyMemoryFault {
    /// The core's request, in a machine with this many bytes of memory.
    pub(crate) fn fault(&self, memory: u64) -> PyResult<ImplicitRequest> {
        Ok(ImplicitRequest {
            vcpu: self.vcpu.get(),
            range: pages(self.gpa.get(), self.size.get())?,
            access: accessed(self.private.get()),
            flags: self.flags.get(),
            errno: Errno(self.errno.get()),
            state: self.state.get().state().unwrap_or(State::Shared),
            rip: self.rip.get(),
            executed: self.executed.get(),
            repeats: self.repeats.get(),
            time: self.time.get(),
            memory: Views::new(memory, None, None),
        })
    }
}

#[pymethods]
impl PyMemoryFault {
    #[new]
    #[pyo3(signature = (gpa, *, private = false, vcpu = 0, size = PAGE_SIZE, flags = None, errno = EFAULT,
                        state = None, rip = 0, repeats = 0, time = 0, executed = false),
           text_signature = "(gpa, *, private=False, vcpu=0, size=4096, flags=None, errno=14, state=None, rip=0, \
                             repeats=0, time=0, executed=False)")]
    #[expect(clippy::too_many_arguments, reason = "one for each field")]
    fn new(
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = arguments::flag::<arguments::named::private>)] private: bool,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::vcpu, _>)] vcpu: u32,
        #[pyo3(from_py_with = sizes::size::<arguments::named::size, _>)] size: u64,
        #[pyo3(from_py_with = arguments::optional::<arguments::named::flags, _>)] flags: Option<u64>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::errno, _>)] errno: i32,
        #[pyo3(from_py_with = arguments::optional_text::<arguments::named::state>)] state: Option<String>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::rip, _>)] rip: u64,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::repeats, _>)] repeats: u32,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::time, _>)] time: u64,
        #[pyo3(from_py_with = arguments::flag::<arguments::named::executed>)] executed: bool,
    ) -> PyResult<Self> {
        let range = pages(gpa, size)?;
        let access = accessed(private);
        let state = state.map_or(Ok(access.other()), |state| arguments::state(&state, "state"))?;
        Ok(Self {
            vcpu: vcpu.into(),
            gpa: range.gpa().into(),
            size: range.size().into(),
            private: private.into(),
            flags: flags.unwrap_or(if private { FLAG_PRIVATE } else { 0 }).into(),
            errno: positive(errno)?.0.into(),
            state: RangeState::from(state).into(),
            rip: rip.into(),
            executed: executed.into(),
            repeats: repeats.into(),
            time: time.into(),
        })
    }

    /// The general registers of the vCPU, read when this is looked at: in the hook, and in the hook's own thread.
    ///
    /// AttributeError anywhere else, PagegateError if KVM_GET_REGS fails.
    #[getter]
    fn regs(slf: &Bound<'_, Self>) -> PyResult<PyRegisters> {
        asker::regs(slf)
    }

    /// The kernel's function that the vCPU is in, such as "set_memory_decrypted+0x1f"; ``None`` if it is not known.
    ///
    /// Of a kernel that ``Vm.boot`` loaded, from the symbols in its image. AttributeError as for ``regs``;
    /// PagegateError if the run ends while they are read.
    #[getter]
    fn symbol(slf: &Bound<'_, Self>) -> PyResult<Option<String>> {
        asker::symbol(slf)
    }

    /// The instruction that the vCPU is at; ``None`` if it lies in private memory. AttributeError as for ``regs``.
    ///
    /// A kernel's instruction is the one of its image: it patches some of them when it boots.
    #[getter]
    fn disassembly(slf: &Bound<'_, Self>) -> PyResult<Option<String>> {
        asker::disassembly(slf)
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        let Self {
            vcpu,
            gpa,
            size,
            private,
            flags,
            errno,
            state,
            rip,
            executed,
            repeats,
            time,
        } = slf.get();
        let class = slf.get_type().name()?;
        let [private, executed] = [private, executed].map(|field| if field.get() { "True" } else { "False" });
        Ok(format!(
            "{class}(vcpu={}, gpa={:#x}, size={:#x}, private={private}, flags={:#x}, errno={}, state={:?}, rip={:#x}, \
             executed={executed}, repeats={}, time={})",
            vcpu.get(),
            gpa.get(),
            size.get(),
            flags.get(),
            errno.get(),
            state.get().as_str(),
            rip.get(),
            repeats.get(),
            time.get()
        ))
    }
}

/// The guest accessed a poisoned page (EHWPOISON). ``Convert`` is no answer: it does not repair the page.
///
/// One can be made, as a ``MemoryFault``; ``state`` is by default the accessed one.
#[pyclass(name = "MemoryPoison", module = "pagegate", frozen, extends = PyMemoryFault)]
pub(crate) struct PyMemoryPoison;

impl PyMemoryPoison {
    pub(crate) fn of(fault: &ImplicitRequest) -> PyClassInitializer<Self> {
        PyClassInitializer::from(PyMemoryFault::from(fault)).add_subclass(Self)
    }
}

#[pymethods]
impl PyMemoryPoison {
    #[new]
    #[pyo3(signature = (gpa, *, private = false, vcpu = 0, size = PAGE_SIZE, flags = None, errno = EHWPOISON,
                        state = None, rip = 0, repeats = 0, time = 0, executed = false),
           text_signature = "(gpa, *, private=False, vcpu=0, size=4096, flags=None, errno=133, state=None, rip=0, \
                             repeats=0, time=0, executed=False)")]
    #[expect(clippy::too_many_arguments, reason = "one for each field")]
    fn new(
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = arguments::flag::<arguments::named::private>)] private: bool,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::vcpu, _>)] vcpu: u32,
        #[pyo3(from_py_with = sizes::size::<arguments::named::size, _>)] size: u64,
        #[pyo3(from_py_with = arguments::optional::<arguments::named::flags, _>)] flags: Option<u64>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::errno, _>)] errno: i32,
        #[pyo3(from_py_with = arguments::optional_text::<arguments::named::state>)] state: Option<String>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::rip, _>)] rip: u64,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::repeats, _>)] repeats: u32,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::time, _>)] time: u64,
        #[pyo3(from_py_with = arguments::flag::<arguments::named::executed>)] executed: bool,
    ) -> PyResult<PyClassInitializer<Self>> {
        let state = state.or_else(|| Some(accessed(private).as_str().to_owned()));
        let fault = PyMemoryFault::new(
            gpa, private, vcpu, size, flags, errno, state, rip, repeats, time, executed,
        )?;
        Ok(PyClassInitializer::from(fault).add_subclass(Self))
    }
}

/// An explicit request: a well-formed KVM_HC_MAP_GPA_RANGE, by hypercall or doorbell.
///
/// A malformed one gets EINVAL in RAX and reaches no policy. Nor does one to share what is no memory, such as a
/// device's range: it gets 0, and nothing is done.
///
/// One can be made to test a policy: ``raw`` follows from ``to`` and ``page_size`` and must not contradict them;
/// ``state`` is by default the opposite of ``to``. Raises ValueError.
#[pyclass(name = "MapGpaRange", module = "pagegate", frozen, get_all)]
pub(crate) struct PyMapGpaRange {
    /// Index of the vCPU.
    vcpu: Field<u32>,
    /// Start in bytes, a multiple of 4096, without the view bit.
    gpa: Field<u64>,
    /// Length in bytes, a multiple of 4096. The whole range lies in guest memory.
    size: Field<u64>,
    /// The state that the guest asks for.
    to: Field<RangeState>,
    /// The guest's page size hint in bytes: 4096, 2 MiB or 1 GiB.
    page_size: Field<u64>,
    /// RDX: bits 3:0 are the page size hint, bit 4 (encrypted) asks for private.
    raw: Field<u64>,
    /// The state of the range when the policy is asked.
    ///
    /// If the pages change while the policy decides, it is asked again, up to 16 times; then the guest gets EAGAIN.
    state: Field<RangeState>,
    /// When the vCPU exited: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``.
    time: Field<u64>,
}

impl From<&ExplicitRequest> for PyMapGpaRange {
    fn from(call: &ExplicitRequest) -> Self {
        Self {
            vcpu: call.vcpu.into(),
            gpa: call.range.gpa().into(),
            size: call.range.size().into(),
            to: RangeState::from(call.to).into(),
            page_size: call.page_size.into(),
            raw: call.raw.into(),
            state: RangeState::from(call.state).into(),
            time: call.time.into(),
        }
    }
}

impl HookArgument for PyMapGpaRange {
    type Question = ExplicitRequest;

    fn make<'py>(py: Python<'py>, call: &ExplicitRequest) -> PyResult<Bound<'py, Self>> {
        Bound::new(py, Self::from(call))
    }

    fn set(&self, call: &ExplicitRequest) {
        self.vcpu.set(call.vcpu);
        self.gpa.set(call.range.gpa());
        self.size.set(call.range.size());
        self.to.set(call.to.into());
        self.page_size.set(call.page_size);
        self.raw.set(call.raw);
        self.state.set(call.state.into());
        self.time.set(call.time);
    }

    fn spare() -> &'static LocalKey<Spare<Self>> {
        thread_local!(static SPARE: Spare<PyMapGpaRange> = const { Cell::new(None) });
        &SPARE
    }
}

impl PyMapGpaRange {
    /// The core's request, in a machine with this many bytes of memory.
    pub(crate) fn call(&self, memory: u64) -> PyResult<ExplicitRequest> {
        Ok(ExplicitRequest {
            vcpu: self.vcpu.get(),
            range: pages(self.gpa.get(), self.size.get())?,
            to: self.to.get().state().unwrap_or(State::Shared),
            page_size: self.page_size.get(),
            raw: self.raw.get(),
            state: self.state.get().state(),
            time: self.time.get(),
            memory: Views::new(memory, None, None),
        })
    }
}

fn range_state(word: &str) -> PyResult<RangeState> {
    let all = [RangeState::Shared, RangeState::Private, RangeState::Mixed];
    arguments::choose(word, "state", all.map(|state| (state.as_str(), state)))
}

#[pymethods]
impl PyMapGpaRange {
    #[new]
    #[pyo3(signature = (gpa, size = PAGE_SIZE, *, to, vcpu = 0, page_size = PAGE_SIZE, raw = None, state = None,
                        time = 0),
           text_signature = "(gpa, size=4096, *, to, vcpu=0, page_size=4096, raw=None, state=None, time=0)")]
    #[expect(clippy::too_many_arguments, reason = "one for each field")]
    fn new(
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = sizes::size::<arguments::named::size, _>)] size: u64,
        #[pyo3(from_py_with = arguments::state_named::<arguments::named::to>)] to: State,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::vcpu, _>)] vcpu: u32,
        #[pyo3(from_py_with = sizes::size::<arguments::named::page_size, _>)] page_size: u64,
        #[pyo3(from_py_with = arguments::optional::<arguments::named::raw, _>)] raw: Option<u64>,
        #[pyo3(from_py_with = arguments::optional_text::<arguments::named::state>)] state: Option<String>,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::time, _>)] time: u64,
    ) -> PyResult<Self> {
        let range = pages(gpa, size)?;
        let state = state.map_or(Ok(to.other().into()), |state| range_state(&state))?;
        let implied = map_gpa_range::attributes(to, page_size).ok_or_else(|| {
            PyValueError::new_err(format!("page_size is {page_size:#x}: it must be 4 KiB, 2 MiB or 1 GiB"))
        })?;
        if raw.is_some_and(|raw| raw != implied) {
            return Err(PyValueError::new_err(format!(
                "raw contradicts to and page_size, which make {implied:#x}"
            )));
        }
        Ok(Self {
            vcpu: vcpu.into(),
            gpa: range.gpa().into(),
            size: range.size().into(),
            to: RangeState::from(to).into(),
            page_size: page_size.into(),
            raw: implied.into(),
            state: state.into(),
            time: time.into(),
        })
    }

    /// The vCPU's instruction pointer, as ``regs.rip``. AttributeError and PagegateError as for ``regs``.
    #[getter]
    fn rip(slf: &Bound<'_, Self>) -> PyResult<u64> {
        Ok(asker::regs(slf)?.rip)
    }

    /// The general registers of the vCPU, read when this is looked at: in the hook, and in the hook's own thread.
    ///
    /// AttributeError anywhere else, PagegateError if KVM_GET_REGS fails.
    #[getter]
    fn regs(slf: &Bound<'_, Self>) -> PyResult<PyRegisters> {
        asker::regs(slf)
    }

    /// The kernel's function that the vCPU is in, such as "set_memory_decrypted+0x1f"; ``None`` if it is not known.
    ///
    /// Of a kernel that ``Vm.boot`` loaded, from the symbols in its image. AttributeError as for ``regs``;
    /// PagegateError if the run ends while they are read.
    #[getter]
    fn symbol(slf: &Bound<'_, Self>) -> PyResult<Option<String>> {
        asker::symbol(slf)
    }

    /// The instruction that the vCPU is at; ``None`` if it lies in private memory. AttributeError as for ``regs``.
    ///
    /// A kernel's instruction is the one of its image: it patches some of them when it boots.
    #[getter]
    fn disassembly(slf: &Bound<'_, Self>) -> PyResult<Option<String>> {
        asker::disassembly(slf)
    }

    fn __repr__(&self) -> String {
        let Self {
            vcpu,
            gpa,
            size,
            to,
            page_size,
            raw,
            state,
            time,
        } = self;
        format!(
            "MapGpaRange(vcpu={}, gpa={:#x}, size={:#x}, to={:?}, page_size={:#x}, raw={:#x}, state={:?}, time={})",
            vcpu.get(),
            gpa.get(),
            size.get(),
            to.get().as_str(),
            page_size.get(),
            raw.get(),
            state.get().as_str(),
            time.get()
        )
    }
}
