//! What a hook may answer.

use std::time::Duration;

use pagegate_core::errno::{EINVAL, Errno};
use pagegate_core::memory::address::{Range, State};
use pagegate_core::policy::decision::{self as core, Decision, Lesson, Region};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::interpreter::{arguments, errors};

const MAX_ERRNO: i32 = 4095;

/// Where a decision holds for more than one request: it is remembered, and the policy is not asked again.
///
/// It answers requests that lie in the region and are of the same kind: implicit or explicit, to private or to shared.
/// ``gpa`` and ``size`` are in bytes, multiples of 4096. ``uses``: how many requests it answers, at least 1.
/// ``seconds``: for how long. Without them it holds until ``vm.policy.forget()``, or until later ones have pushed it
/// out: at most 4096 are kept, and where two overlap the later one holds. Raises ValueError.
#[pyclass(name = "Region", module = "pagegate", frozen, eq, hash, from_py_object)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PyRegion(Region);

#[pymethods]
impl PyRegion {
    #[new]
    #[pyo3(signature = (gpa, size, *, uses = None, seconds = None))]
    fn new(
        #[pyo3(from_py_with = arguments::integer)] gpa: u64,
        #[pyo3(from_py_with = arguments::integer)] size: u64,
        #[pyo3(from_py_with = arguments::optional)] uses: Option<u64>,
        seconds: Option<f64>,
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

    /// Bytes.
    #[getter]
    fn size(&self) -> u64 {
        self.0.range.size()
    }

    /// How many requests it answers; ``None``: any number.
    #[getter]
    fn uses(&self) -> Option<u64> {
        self.0.uses
    }

    /// For how long; ``None``: for good.
    #[getter]
    fn seconds(&self) -> Option<f64> {
        self.0.nanoseconds.map(|time| time as f64 / 1e9)
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

fn nanoseconds(seconds: f64) -> PyResult<u64> {
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() => Ok(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)),
        _ => Err(PyValueError::new_err(format!(
            "seconds is {seconds}: it must be a number above 0"
        ))),
    }
}

/// Converts: as asked, or to another state, or other pages.
///
/// A page that changes state loses its bytes: it reads as zeroes. So widen only where the neighbours have nothing to
/// lose, or where they are in the wanted state already.
///
/// ``gpa`` and ``size`` are in bytes, multiples of 4096, inside memory; else the run ends with PolicyError. The
/// conversion is one transaction, or several in a row for more than 256 MiB; what the kernel refuses is undone. Then an
/// explicit request finds the errno in RAX, and an implicit one ends the run.
#[pyclass(name = "Convert", module = "pagegate", frozen, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyConvert {
    to: Option<State>,
    /// ``None``: as asked.
    #[pyo3(get)]
    gpa: Option<u64>,
    /// ``None``: as asked.
    #[pyo3(get)]
    size: Option<u64>,
    /// Have KVM map the pages before the guest touches them (KVM_PRE_FAULT_MEMORY), where the host can.
    #[pyo3(get)]
    prefault: bool,
    /// Free the stale side. If not, its bytes come back when the page does, and memory is held twice till then.
    #[pyo3(get)]
    discard: bool,
    /// Where else this holds, without asking again.
    #[pyo3(get)]
    remember: Option<PyRegion>,
}

#[pymethods]
impl PyConvert {
    #[new]
    #[pyo3(signature = (to = None, gpa = None, size = None, *, prefault = false, discard = true, remember = None))]
    fn new(
        to: Option<&str>,
        #[pyo3(from_py_with = arguments::optional)] gpa: Option<u64>,
        #[pyo3(from_py_with = arguments::optional)] size: Option<u64>,
        prefault: bool,
        discard: bool,
        remember: Option<PyRegion>,
    ) -> PyResult<Self> {
        let to = to.map(|to| arguments::state(to, "to")).transpose()?;
        Ok(Self {
            to,
            gpa,
            size,
            prefault,
            discard,
            remember,
        })
    }

    /// ``None``: as asked.
    #[getter]
    fn to(&self) -> Option<&'static str> {
        self.to.map(State::as_str)
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

/// Refuses. Explicit: the guest finds ``errno``, positive, in RAX. Implicit: the run ends as "denied".
///
/// ``errno`` is in 1..=4095 (ValueError). SNP and TDX guests accept only EINVAL and EAGAIN.
#[pyclass(name = "Deny", module = "pagegate", frozen, get_all, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyDeny {
    errno: i32,
    /// Where else this holds, without asking again.
    remember: Option<PyRegion>,
}

#[pymethods]
impl PyDeny {
    #[new]
    #[pyo3(signature = (errno = EINVAL, *, remember = None), text_signature = "(errno=22, *, remember=None)")]
    fn new(errno: i32, remember: Option<PyRegion>) -> PyResult<Self> {
        match (1..=MAX_ERRNO).contains(&errno) {
            true => Ok(Self { errno, remember }),
            false => Err(PyValueError::new_err(format!(
                "errno is {errno}: it must be in 1..={MAX_ERRNO}"
            ))),
        }
    }

    fn __repr__(&self) -> String {
        let remember = remembered(self.remember.as_ref()).map(|region| format!(", {region}"));
        format!("Deny(errno={}{})", self.errno, remember.unwrap_or_default())
    }
}

/// Lets the guest try again: an implicit request re-executes, an explicit one finds EAGAIN in RAX.
///
/// After ``LIVELOCK_BOUND`` identical faults with no change in between the run ends as "livelock".
#[pyclass(name = "Retry", module = "pagegate", frozen, get_all, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyRetry {
    /// Where else this holds, without asking again.
    remember: Option<PyRegion>,
}

#[pymethods]
impl PyRetry {
    #[new]
    #[pyo3(signature = (*, remember = None))]
    fn new(remember: Option<PyRegion>) -> Self {
        Self { remember }
    }

    fn __repr__(&self) -> String {
        format!("Retry({})", remembered(self.remember.as_ref()).unwrap_or_default())
    }
}

fn remembered(region: Option<&PyRegion>) -> Option<String> {
    region.map(|region| format!("remember={}", region.__repr__()))
}

/// Ends the run: ``report.reason`` is ``reason``. Nothing is converted; an explicit request finds EAGAIN.
#[pyclass(name = "Stop", module = "pagegate", frozen, get_all, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyStop {
    reason: String,
}

#[pymethods]
impl PyStop {
    #[new]
    fn new(reason: String) -> Self {
        Self { reason }
    }

    fn __repr__(&self) -> String {
        format!("Stop({:?})", self.reason)
    }
}

/// Frees the poisoned page and lets the guest go on: it reads zeroes. An answer to ``memory_poison`` only.
#[pyclass(name = "Discard", module = "pagegate", frozen, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyDiscard;

#[pymethods]
impl PyDiscard {
    #[new]
    fn new() -> Self {
        Self
    }

    fn __repr__(&self) -> &'static str {
        "Discard()"
    }
}

/// Reads a hook's answer.
pub(crate) fn read(answer: &Bound<'_, PyAny>, hook: &str) -> PyResult<Decision> {
    let (decision, remember) = if let Ok(convert) = answer.cast::<PyConvert>() {
        let convert = convert.get();
        let decision = Decision::Convert(core::Convert {
            to: convert.to,
            gpa: convert.gpa,
            size: convert.size,
            prefault: convert.prefault,
            keep: !convert.discard,
            max_shared: None,
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
        let answer = answer.repr()?;
        return Err(errors::policy_error(
            answer.py(),
            format!(
                "{hook} answered {answer}, which is no decision: return Convert(), Deny(), Retry() or Stop(reason)"
            ),
        ));
    };
    Ok(match remember {
        None => decision,
        Some(region) => Decision::Remember(Box::new(Lesson {
            decision,
            region: region.0,
        })),
    })
}

/// A decision as a hook would have answered it.
pub(crate) fn write(py: Python<'_>, decision: Decision) -> PyResult<Py<PyAny>> {
    let (decision, remember) = match decision {
        Decision::Remember(lesson) => (lesson.decision, Some(PyRegion(lesson.region))),
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
        // One that holds elsewhere twice over is not made.
        Decision::Remember(lesson) => write(py, lesson.decision)?,
    })
}
