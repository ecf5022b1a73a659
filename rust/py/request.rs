//! What a hook is asked.

use pagegate_core::attributes::State;
use pagegate_core::policy::{Call, Fault};
use pyo3::prelude::*;

/// An implicit request: an access met a page that is not in the accessed state (KVM_EXIT_MEMORY_FAULT).
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

#[pymethods]
impl PyMemoryFault {
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
#[pyclass(name = "MemoryPoison", module = "pagegate", frozen, extends = PyMemoryFault)]
pub(crate) struct PyMemoryPoison;

impl PyMemoryPoison {
    pub(crate) fn of(fault: &Fault) -> PyClassInitializer<Self> {
        PyClassInitializer::from(PyMemoryFault::from(fault)).add_subclass(Self)
    }
}

/// An explicit request: a well-formed KVM_HC_MAP_GPA_RANGE. Malformed ones find EINVAL and reach no policy.
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
            state: call.state.map_or("mixed", State::as_str),
            time: call.time,
        }
    }
}

#[pymethods]
impl PyMapGpaRange {
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
