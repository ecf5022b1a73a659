//! What a hook is asked.

use pagegate_core::attributes::{PAGE_SIZE, Range, State};
use pagegate_core::errno::{EFAULT, EHWPOISON, Errno};
use pagegate_core::explicit;
use pagegate_core::policy::{Call, Fault};
use pagegate_core::run::MEMORY_EXIT_FLAG_PRIVATE;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::names;

/// What only tests and replays need: those of the machine are in order.
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

pub(crate) const MIXED: &str = "mixed";

fn accessed(private: bool) -> State {
    match private {
        true => State::Private,
        false => State::Shared,
    }
}

/// An implicit request: an access met a page that is not in the accessed state (KVM_EXIT_MEMORY_FAULT).
///
/// One can be made, to try a policy on it. ``flags`` are by default those of the access, ``state`` is the opposite of
/// what was accessed. ``gpa`` and ``size`` are multiples of 4096. Raises ValueError.
#[pyclass(name = "MemoryFault", module = "pagegate", frozen, get_all, subclass)]
pub(crate) struct PyMemoryFault {
    /// Index of the vCPU.
    vcpu: u32,
    /// The page, in bytes, shared bit stripped.
    gpa: u64,
    /// Bytes: 4096 on x86.
    size: u64,
    /// Whether the access was to the private side.
    private: bool,
    /// KVM_MEMORY_EXIT_FLAG_* as KVM reported them; PRIVATE is 8.
    flags: u64,
    /// EFAULT; EHWPOISON for poison.
    errno: i32,
    /// The page's present state.
    state: &'static str,
    /// The guest's instruction pointer.
    rip: u64,
    /// How often this very fault came before with no change of its page in between; 0 the first time.
    repeats: u32,
    /// When it came: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``.
    time: u64,
}

impl From<&Fault> for PyMemoryFault {
    fn from(fault: &Fault) -> Self {
        Self {
            vcpu: fault.vcpu,
            gpa: fault.range.gpa(),
            size: fault.range.size(),
            private: fault.access == State::Private,
            flags: fault.flags,
            errno: fault.errno.0,
            state: fault.state.as_str(),
            rip: fault.rip,
            repeats: fault.repeats,
            time: fault.time,
        }
    }
}

impl PyMemoryFault {
    /// What the core would ask about, in a machine with so much memory.
    pub(crate) fn fault(&self, memory: u64) -> PyResult<Fault> {
        Ok(Fault {
            vcpu: self.vcpu,
            range: pages(self.gpa, self.size)?,
            access: accessed(self.private),
            flags: self.flags,
            errno: Errno(self.errno),
            state: names::state(self.state, "state")?,
            rip: self.rip,
            repeats: self.repeats,
            time: self.time,
            memory,
        })
    }
}

#[pymethods]
impl PyMemoryFault {
    #[new]
    #[pyo3(signature = (gpa, *, private = false, vcpu = 0, size = PAGE_SIZE, flags = None, errno = EFAULT,
                        state = None, rip = 0, repeats = 0, time = 0),
           text_signature = "(gpa, *, private=False, vcpu=0, size=4096, flags=None, errno=14, state=None, rip=0, \
                             repeats=0, time=0)")]
    #[expect(clippy::too_many_arguments, reason = "one for each field")]
    fn new(
        #[pyo3(from_py_with = names::u64)] gpa: u64,
        private: bool,
        #[pyo3(from_py_with = names::u32)] vcpu: u32,
        #[pyo3(from_py_with = names::u64)] size: u64,
        #[pyo3(from_py_with = names::optional_u64)] flags: Option<u64>,
        #[pyo3(from_py_with = names::i32)] errno: i32,
        state: Option<&str>,
        #[pyo3(from_py_with = names::u64)] rip: u64,
        #[pyo3(from_py_with = names::u32)] repeats: u32,
        #[pyo3(from_py_with = names::u64)] time: u64,
    ) -> PyResult<Self> {
        let range = pages(gpa, size)?;
        let access = accessed(private);
        let state = state.map_or(Ok(access.other()), |state| names::state(state, "state"))?;
        Ok(Self {
            vcpu,
            gpa: range.gpa(),
            size: range.size(),
            private,
            flags: flags.unwrap_or(if private { MEMORY_EXIT_FLAG_PRIVATE } else { 0 }),
            errno: positive(errno)?.0,
            state: state.as_str(),
            rip,
            repeats,
            time,
        })
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
            repeats,
            time,
        } = slf.get();
        let class = slf.get_type().name()?;
        let private = if *private { "True" } else { "False" };
        Ok(format!(
            "{class}(vcpu={vcpu}, gpa={gpa:#x}, size={size:#x}, private={private}, flags={flags:#x}, errno={errno}, \
             state={state:?}, rip={rip:#x}, repeats={repeats}, time={time})"
        ))
    }
}

/// An access met a poisoned page (EHWPOISON). No conversion repairs that: ``Convert`` is no answer here.
///
/// One can be made, as a ``MemoryFault``; ``state`` is by default what was accessed.
#[pyclass(name = "MemoryPoison", module = "pagegate", frozen, extends = PyMemoryFault)]
pub(crate) struct PyMemoryPoison;

impl PyMemoryPoison {
    pub(crate) fn of(fault: &Fault) -> PyClassInitializer<Self> {
        PyClassInitializer::from(PyMemoryFault::from(fault)).add_subclass(Self)
    }
}

#[pymethods]
impl PyMemoryPoison {
    #[new]
    #[pyo3(signature = (gpa, *, private = false, vcpu = 0, size = PAGE_SIZE, flags = None, errno = EHWPOISON,
                        state = None, rip = 0, repeats = 0, time = 0),
           text_signature = "(gpa, *, private=False, vcpu=0, size=4096, flags=None, errno=133, state=None, rip=0, \
                             repeats=0, time=0)")]
    #[expect(clippy::too_many_arguments, reason = "one for each field")]
    fn new(
        #[pyo3(from_py_with = names::u64)] gpa: u64,
        private: bool,
        #[pyo3(from_py_with = names::u32)] vcpu: u32,
        #[pyo3(from_py_with = names::u64)] size: u64,
        #[pyo3(from_py_with = names::optional_u64)] flags: Option<u64>,
        #[pyo3(from_py_with = names::i32)] errno: i32,
        state: Option<&str>,
        #[pyo3(from_py_with = names::u64)] rip: u64,
        #[pyo3(from_py_with = names::u32)] repeats: u32,
        #[pyo3(from_py_with = names::u64)] time: u64,
    ) -> PyResult<PyClassInitializer<Self>> {
        let state = state.or(Some(accessed(private).as_str()));
        let fault = PyMemoryFault::new(gpa, private, vcpu, size, flags, errno, state, rip, repeats, time)?;
        Ok(PyClassInitializer::from(fault).add_subclass(Self))
    }
}

/// An explicit request: a well-formed KVM_HC_MAP_GPA_RANGE. Malformed ones find EINVAL and reach no policy.
///
/// One can be made, to try a policy on it. ``raw`` follows from ``to`` and ``page_size`` and must not contradict them;
/// ``state`` is by default the opposite of ``to``. Raises ValueError.
#[pyclass(name = "MapGpaRange", module = "pagegate", frozen, get_all)]
pub(crate) struct PyMapGpaRange {
    /// Index of the vCPU.
    vcpu: u32,
    /// Start in bytes, shared bit stripped; a multiple of 4096.
    gpa: u64,
    /// Bytes; a multiple of 4096. The whole range lies in memory.
    size: u64,
    /// What the guest wants the pages to be.
    to: &'static str,
    /// The guest's hint: 4096, 2 MiB or 1 GiB.
    page_size: u64,
    /// RDX: bits 3:0 are the hint, bit 4 is "encrypted".
    raw: u64,
    /// The present state of the range.
    state: &'static str,
    /// When it came: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``.
    time: u64,
}

impl From<&Call> for PyMapGpaRange {
    fn from(call: &Call) -> Self {
        Self {
            vcpu: call.vcpu,
            gpa: call.range.gpa(),
            size: call.range.size(),
            to: call.to.as_str(),
            page_size: call.page_size,
            raw: call.raw,
            state: call.state.map_or(MIXED, State::as_str),
            time: call.time,
        }
    }
}

impl PyMapGpaRange {
    /// What the core would ask about, in a machine with so much memory.
    pub(crate) fn call(&self, memory: u64) -> PyResult<Call> {
        Ok(Call {
            vcpu: self.vcpu,
            range: pages(self.gpa, self.size)?,
            to: names::state(self.to, "to")?,
            page_size: self.page_size,
            raw: self.raw,
            state: state_or_mixed(self.state)?,
            time: self.time,
            memory,
        })
    }
}

/// `None` for "mixed".
fn state_or_mixed(word: &str) -> PyResult<Option<State>> {
    let states = [State::Shared, State::Private].map(|state| (state.as_str(), Some(state)));
    names::choose(word, "state", states.into_iter().chain([(MIXED, None)]))
}

#[pymethods]
impl PyMapGpaRange {
    #[new]
    #[pyo3(signature = (gpa, size = PAGE_SIZE, *, to, vcpu = 0, page_size = PAGE_SIZE, raw = None, state = None,
                        time = 0),
           text_signature = "(gpa, size=4096, *, to, vcpu=0, page_size=4096, raw=None, state=None, time=0)")]
    #[expect(clippy::too_many_arguments, reason = "one for each field")]
    fn new(
        #[pyo3(from_py_with = names::u64)] gpa: u64,
        #[pyo3(from_py_with = names::u64)] size: u64,
        to: &str,
        #[pyo3(from_py_with = names::u32)] vcpu: u32,
        #[pyo3(from_py_with = names::u64)] page_size: u64,
        #[pyo3(from_py_with = names::optional_u64)] raw: Option<u64>,
        state: Option<&str>,
        #[pyo3(from_py_with = names::u64)] time: u64,
    ) -> PyResult<Self> {
        let range = pages(gpa, size)?;
        let to = names::state(to, "to")?;
        let state = state.map_or(Ok(Some(to.other())), state_or_mixed)?;
        let implied = explicit::attributes(to, page_size).ok_or_else(|| {
            PyValueError::new_err(format!("page_size is {page_size:#x}: it must be 4 KiB, 2 MiB or 1 GiB"))
        })?;
        if raw.is_some_and(|raw| raw != implied) {
            return Err(PyValueError::new_err(format!(
                "raw contradicts to and page_size, which make {implied:#x}"
            )));
        }
        Ok(Self {
            vcpu,
            gpa: range.gpa(),
            size: range.size(),
            to: to.as_str(),
            page_size,
            raw: implied,
            state: state.map_or(MIXED, State::as_str),
            time,
        })
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
            "MapGpaRange(vcpu={vcpu}, gpa={gpa:#x}, size={size:#x}, to={to:?}, page_size={page_size:#x}, raw={raw:#x}, \
             state={state:?}, time={time})"
        )
    }
}
