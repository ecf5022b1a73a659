//! What a hook may answer.

use pagegate_core::attributes::State;
use pagegate_core::errno::{EINVAL, Errno};
use pagegate_core::policy::{Conversion, Decision};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::{errors, names};

const MAX_ERRNO: i32 = 4095;

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
}

#[pymethods]
impl PyConvert {
    #[new]
    #[pyo3(signature = (to = None, gpa = None, size = None, *, prefault = false, discard = true))]
    fn new(
        to: Option<&str>,
        #[pyo3(from_py_with = names::optional_u64)] gpa: Option<u64>,
        #[pyo3(from_py_with = names::optional_u64)] size: Option<u64>,
        prefault: bool,
        discard: bool,
    ) -> PyResult<Self> {
        let to = to.map(|to| names::state(to, "to")).transpose()?;
        Ok(Self {
            to,
            gpa,
            size,
            prefault,
            discard,
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
        let parts: Vec<String> = [to, hex("gpa", self.gpa), hex("size", self.size), prefault, discard]
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
}

#[pymethods]
impl PyDeny {
    #[new]
    #[pyo3(signature = (errno = EINVAL), text_signature = "(errno=22)")]
    fn new(errno: i32) -> PyResult<Self> {
        match (1..=MAX_ERRNO).contains(&errno) {
            true => Ok(Self { errno }),
            false => Err(PyValueError::new_err(format!(
                "errno is {errno}: it must be in 1..={MAX_ERRNO}"
            ))),
        }
    }

    fn __repr__(&self) -> String {
        format!("Deny(errno={})", self.errno)
    }
}

/// Lets the guest try again: an implicit request re-executes, an explicit one finds EAGAIN in RAX.
///
/// After ``LIVELOCK_BOUND`` identical faults with no change in between the run ends as "livelock".
#[pyclass(name = "Retry", module = "pagegate", frozen, eq, hash)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct PyRetry;

#[pymethods]
impl PyRetry {
    #[new]
    fn new() -> Self {
        Self
    }

    fn __repr__(&self) -> &'static str {
        "Retry()"
    }
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
    if let Ok(convert) = answer.cast::<PyConvert>() {
        let convert = convert.get();
        return Ok(Decision::Convert(Conversion {
            to: convert.to,
            gpa: convert.gpa,
            size: convert.size,
            prefault: convert.prefault,
            keep: !convert.discard,
            max_shared: None,
        }));
    }
    if let Ok(deny) = answer.cast::<PyDeny>() {
        return Ok(Decision::Deny(Errno(deny.get().errno)));
    }
    if answer.is_instance_of::<PyRetry>() {
        return Ok(Decision::Retry);
    }
    if let Ok(stop) = answer.cast::<PyStop>() {
        return Ok(Decision::Stop(stop.get().reason.clone()));
    }
    if answer.is_instance_of::<PyDiscard>() {
        return Ok(Decision::Discard);
    }
    let answer = answer.repr()?;
    Err(errors::policy_error(
        answer.py(),
        format!("{hook} answered {answer}, which is no decision: return Convert(), Deny(), Retry() or Stop(reason)"),
    ))
}
