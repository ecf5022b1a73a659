//! The decisions, as Python classes.

use std::time::Duration;

use pagegate_core::errno::{EINVAL, Errno};
use pagegate_core::memory::address::{Range, State};
use pagegate_core::policy::decision::{self as core, Decision, Region, RegionDecision};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

use crate::interpreter::{arguments, call, errors, record, sizes};

const MAX_ERRNO: i32 = 4095;

/// The pages for which a decision is remembered: the policy is not asked again about requests for them.
///
/// A remembered decision answers requests of the same kind (implicit or explicit, to private or to shared) whose pages
/// all lie in the region, and which the hook wants (``only``). ``gpa`` and ``size``: bytes, multiples of 4096.
/// ``uses``: how many more requests it answers, at least 1. ``seconds``: how long it holds, above 0, from the time of
/// the request on. Without these two it holds until ``vm.policy.forget()`` or ``replace()``. At most 4096 are kept,
/// then the oldest are dropped; where two overlap the later one holds.
///
/// Raises ValueError. A region that does not lie in guest memory, or not in the pages that its ``Convert`` names, ends
/// the run with PolicyError.
#[pyclass(name = "Region", module = "pagegate", frozen, eq, hash, from_py_object)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PyRegion(Region);

#[pymethods]
impl PyRegion {
    #[new]
    #[pyo3(signature = (gpa, size, *, uses = None, seconds = None))]
    fn new(
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = sizes::size::<arguments::named::size, _>)] size: u64,
        #[pyo3(from_py_with = arguments::optional::<arguments::named::uses, _>)] uses: Option<u64>,
        #[pyo3(from_py_with = arguments::optional_real::<arguments::named::seconds>)] seconds: Option<f64>,
    ) -> PyResult<Self> {
        let range = Range::new(gpa, size).ok_or_else(|| {
            PyValueError::new_err(format!(
                "Region({gpa:#x}, {size:#x}): gpa and size must be multiples of 4096, and size above 0"
            ))
        })?;
        if uses == Some(0) {
            return Err(PyValueError::new_err("uses is 0: it must be at least 1"));
        }
        let nanoseconds = seconds.map(nanoseconds).transpose()?;
        Ok(Self(Region {
            range,
            uses,
            nanoseconds,
        }))
    }

    /// Start in bytes.
    #[getter]
    fn gpa(&self) -> u64 {
        self.0.range.gpa()
    }

    /// Length in bytes.
    #[getter]
    fn size(&self) -> u64 {
        self.0.range.size()
    }

    /// How many more requests it answers; ``None`` for any number.
    #[getter]
    fn uses(&self) -> Option<u64> {
        self.0.uses
    }

    /// How long it holds; ``None`` for no limit.
    #[getter]
    fn seconds(&self) -> Option<f64> {
        // Not by way of a float: the object made of this has to be the same.
        self.0.nanoseconds.map(|time| Duration::from_nanos(time).as_secs_f64())
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &["gpa", "size", "uses", "seconds"])
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &["gpa", "size", "uses", "seconds"])
    }

    fn __repr__(&self) -> String {
        let uses = self.uses().map(|uses| format!(", uses={uses}")).unwrap_or_default();
        let seconds = self
            .seconds()
            .map(|time| format!(", seconds={time}"))
            .unwrap_or_default();
        format!("Region({:#x}, {:#x}{uses}{seconds})", self.gpa(), self.size())
    }
}

impl PyRegion {
    pub(crate) fn range(&self) -> Range {
        self.0.range
    }
}

/// The argument of decisions that are remembered; it may be what ``asdict`` made of a region.
fn remembered_region(value: &Bound<'_, PyAny>) -> PyResult<Option<PyRegion>> {
    if value.is_instance_of::<PyDict>() {
        return record::made::<PyRegion, _>(value);
    }
    arguments::extract::<arguments::named::remember, _>(value, "a Region, or None")
}

fn nanoseconds(seconds: f64) -> PyResult<u64> {
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)),
        _ => Err(PyValueError::new_err(format!(
            "seconds is {seconds}: it must be a number above 0"
        ))),
    }
}

/// Converts pages: those that were asked for, to the state that was asked for, unless the arguments say otherwise.
///
/// ``to``: "private" or "shared". ``gpa`` and ``size``: bytes, multiples of 4096, inside guest memory, or text such as
/// "2M"; outside of it the run ends with PolicyError.
///
/// A page that changes state loses its bytes and reads as zeroes. So widen only to pages that hold nothing the guest
/// needs, or that are in the wanted state already.
///
/// What is converted need not be what was asked for. But a guest that touched a page touches it again until that page
/// is in the state it needs: after ``LIVELOCK_BOUND`` identical faults the run ends as "livelock".
///
/// The conversion is one transaction, or several in a row, of at most 256 MiB each. If the kernel refuses, the
/// transaction is undone: an explicit request gets the errno in RAX, an implicit one ends the run with PagegateError.
/// If a listener refuses, the guest tries again: an explicit request gets EAGAIN.
///
/// What earlier transactions converted stays converted. An explicit request then gets EAGAIN, the answer after which a
/// guest asks again, and the event and the report count those bytes, as the exception says them where the run ends.
#[pyclass(name = "Convert", module = "pagegate", frozen, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyConvert {
    to: Option<State>,
    /// Start in bytes; ``None`` for that of the request.
    #[pyo3(get)]
    gpa: Option<u64>,
    /// Length in bytes; ``None`` for that of the request.
    #[pyo3(get)]
    size: Option<u64>,
    /// Whether KVM maps the pages before the guest touches them (KVM_PRE_FAULT_MEMORY), if the host can.
    #[pyo3(get)]
    prefault: bool,
    /// Whether the old side is freed.
    ///
    /// If not, it keeps its bytes, which the guest finds again when the page is converted back. Until then both sides
    /// take up memory. Under attributes KVM's emulation can write to the shared side of a private page; from the first
    /// ``discard=False`` on, such bytes are not freed any more before a page becomes shared, whichever page it is.
    #[pyo3(get)]
    discard: bool,
    /// For which pages this decision is remembered; ``None`` if it is for this request only.
    #[pyo3(get)]
    remember: Option<PyRegion>,
}

#[pymethods]
impl PyConvert {
    #[new]
    #[pyo3(signature = (to = None, gpa = None, size = None, *, prefault = false, discard = true, remember = None))]
    fn new(
        py: Python<'_>,
        #[pyo3(from_py_with = arguments::optional_state::<arguments::named::to>)] to: Option<State>,
        #[pyo3(from_py_with = sizes::optional::<arguments::named::gpa>)] gpa: Option<u64>,
        #[pyo3(from_py_with = sizes::optional::<arguments::named::size>)] size: Option<u64>,
        #[pyo3(from_py_with = arguments::flag::<arguments::named::prefault>)] prefault: bool,
        #[pyo3(from_py_with = arguments::flag::<arguments::named::discard>)] discard: bool,
        #[pyo3(from_py_with = remembered_region)] remember: Option<PyRegion>,
    ) -> PyResult<Py<Self>> {
        let convert = Self {
            to,
            gpa,
            size,
            prefault,
            discard,
            remember,
        };
        // One object for all: making and freeing it is some 355 instructions, 2.7 % of such a request.
        static AS_ASKED: PyOnceLock<Py<PyConvert>> = PyOnceLock::new();
        match convert == Self::as_asked() {
            true => Ok(AS_ASKED.get_or_try_init(py, || Py::new(py, convert))?.clone_ref(py)),
            false => Py::new(py, convert),
        }
    }

    /// The state to convert to; ``None`` for the one asked for.
    #[getter]
    fn to(&self) -> Option<&'static str> {
        self.to.map(State::as_str)
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &["to", "gpa", "size", "prefault", "discard", "remember"])
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &["to", "gpa", "size", "prefault", "discard", "remember"])
    }

    fn __repr__(&self) -> String {
        let hex = |name: &str, value: Option<u64>| value.map(|value| format!("{name}={value:#x}"));
        let to = self.to.map(|to| format!("to={:?}", to.as_str()));
        let prefault = self.prefault.then(|| "prefault=True".to_owned());
        let discard = (!self.discard).then(|| "discard=False".to_owned());
        let remember = remembered(self.remember.as_ref());
        let parts: Vec<String> = [
            to,
            hex("gpa", self.gpa),
            hex("size", self.size),
            prefault,
            discard,
            remember,
        ]
        .into_iter()
        .flatten()
        .collect();
        format!("Convert({})", parts.join(", "))
    }
}

impl PyConvert {
    /// ``Convert()``.
    fn as_asked() -> Self {
        Self {
            to: None,
            gpa: None,
            size: None,
            prefault: false,
            discard: true,
            remember: None,
        }
    }
}

/// Refuses. An explicit request gets ``errno``, positive, in RAX; an implicit one ends the run as "denied".
///
/// ``errno`` is in 1..=4095, else ValueError. SNP and TDX guests accept only EINVAL and EAGAIN.
#[pyclass(name = "Deny", module = "pagegate", frozen, get_all, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyDeny {
    /// What an explicit request gets in RAX.
    errno: i32,
    /// For which pages this decision is remembered; ``None`` if it is for this request only.
    remember: Option<PyRegion>,
}

#[pymethods]
impl PyDeny {
    #[new]
    #[pyo3(signature = (errno = EINVAL, *, remember = None), text_signature = "(errno=22, *, remember=None)")]
    fn new(
        #[pyo3(from_py_with = arguments::integer::<arguments::named::errno, _>)] errno: i32,
        #[pyo3(from_py_with = remembered_region)] remember: Option<PyRegion>,
    ) -> PyResult<Self> {
        match (1..=MAX_ERRNO).contains(&errno) {
            true => Ok(Self { errno, remember }),
            false => Err(PyValueError::new_err(format!(
                "errno is {errno}: it must be in 1..={MAX_ERRNO}"
            ))),
        }
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &["errno", "remember"])
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &["errno", "remember"])
    }

    fn __repr__(&self) -> String {
        let remember = remembered(self.remember.as_ref()).map(|region| format!(", {region}"));
        format!("Deny(errno={}{})", self.errno, remember.unwrap_or_default())
    }
}

/// Lets the guest try again: an implicit request repeats the access, an explicit one gets EAGAIN in RAX.
///
/// After ``LIVELOCK_BOUND`` identical faults with no change of the page in between the run ends as "livelock".
#[pyclass(name = "Retry", module = "pagegate", frozen, get_all, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyRetry {
    /// For which pages this decision is remembered; ``None`` if it is for this request only.
    remember: Option<PyRegion>,
}

#[pymethods]
impl PyRetry {
    #[new]
    #[pyo3(signature = (*, remember = None))]
    fn new(#[pyo3(from_py_with = remembered_region)] remember: Option<PyRegion>) -> Self {
        Self { remember }
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &["remember"])
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &["remember"])
    }

    fn __repr__(&self) -> String {
        format!("Retry({})", remembered(self.remember.as_ref()).unwrap_or_default())
    }
}

fn remembered(region: Option<&PyRegion>) -> Option<String> {
    region.map(|region| format!("remember={}", region.__repr__()))
}

/// Ends the run with ``reason`` as ``report.reason``. Nothing is converted; an explicit request gets EAGAIN.
#[pyclass(name = "Stop", module = "pagegate", frozen, get_all, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyStop {
    /// What ``report.reason`` is to be.
    reason: String,
}

#[pymethods]
impl PyStop {
    #[new]
    fn new(#[pyo3(from_py_with = arguments::text::<arguments::named::reason>)] reason: String) -> Self {
        Self { reason }
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &["reason"])
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &["reason"])
    }

    fn __repr__(&self) -> String {
        format!("Stop({:?})", self.reason)
    }
}

/// Frees a poisoned page, which then reads as zeroes, and resumes the guest. Only for ``memory_poison``.
#[pyclass(name = "Discard", module = "pagegate", frozen, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyDiscard;

#[pymethods]
impl PyDiscard {
    #[new]
    fn new() -> Self {
        Self
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &[])
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &[])
    }

    fn __repr__(&self) -> &'static str {
        "Discard()"
    }
}

/// Reads the decision that a hook returned.
pub(crate) fn read(answer: &Bound<'_, PyAny>, hook: &str) -> PyResult<Decision> {
    let (decision, remember) = if let Ok(convert) = answer.cast::<PyConvert>() {
        let convert = convert.get();
        let decision = Decision::Convert(core::Convert {
            to: convert.to,
            gpa: convert.gpa,
            size: convert.size,
            prefault: convert.prefault,
            keep: !convert.discard,
            ..core::Convert::default()
        });
        (decision, convert.remember.as_ref())
    } else if let Ok(deny) = answer.cast::<PyDeny>() {
        (Decision::Deny(Errno(deny.get().errno)), deny.get().remember.as_ref())
    } else if let Ok(retry) = answer.cast::<PyRetry>() {
        (Decision::Retry, retry.get().remember.as_ref())
    } else if let Ok(stop) = answer.cast::<PyStop>() {
        (Decision::Stop(stop.get().reason.clone()), None)
    } else if answer.is_instance_of::<PyDiscard>() {
        (Decision::Discard, None)
    } else {
        let py = answer.py();
        let answer = call::repr(answer)?;
        return Err(errors::policy_error(
            py,
            format!(
                "{hook} answered {answer}, which is no decision: return Convert(), Deny(), Retry() or Stop(reason)"
            ),
        ));
    };
    Ok(match remember {
        None => decision,
        Some(region) => Decision::Remember(Box::new(RegionDecision {
            decision,
            region: region.0,
        })),
    })
}

/// The decision as the object that a hook would have returned.
pub(crate) fn write(py: Python<'_>, decision: Decision) -> PyResult<Py<PyAny>> {
    let (decision, remember) = match decision {
        Decision::Remember(remembered) => (remembered.decision, Some(PyRegion(remembered.region))),
        decision => (decision, None),
    };
    Ok(match decision {
        Decision::Convert(conversion) => Py::new(
            py,
            PyConvert {
                to: conversion.to,
                gpa: conversion.gpa,
                size: conversion.size,
                prefault: conversion.prefault,
                discard: !conversion.keep,
                remember,
            },
        )?
        .into_any(),
        Decision::Deny(Errno(errno)) => Py::new(py, PyDeny { errno, remember })?.into_any(),
        Decision::Retry | Decision::Wait(_) => Py::new(py, PyRetry { remember })?.into_any(),
        Decision::Discard => Py::new(py, PyDiscard)?.into_any(),
        Decision::Stop(reason) => Py::new(py, PyStop { reason })?.into_any(),
        // A remembered decision never holds another one.
        Decision::Remember(remembered) => write(py, remembered.decision)?,
    })
}
