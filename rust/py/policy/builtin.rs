//! The built-in policies.

use std::sync::Arc;
use std::time::Duration;

use pagegate_core::errno::{EINVAL, Errno};
use pagegate_core::memory::address::Range;
use pagegate_core::policy::align::Align;
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::ping_pong::PingPong;
use pagegate_core::policy::quota::Quota;
use pagegate_core::policy::rate_limit::RateLimit;
use pagegate_core::policy::simple::{Allow, DenyAll, ExplicitOnly};
use pagegate_core::policy::window::Window;
use pyo3::PyClass;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::judge::{Judge, PyBuiltin};
use crate::interpreter::{arguments, errors, sizes};

type Made<T> = PyResult<PyClassInitializer<T>>;

/// The most policies that ask each other: each is a call within the last one's.
const LONGEST: usize = 1000;

/// Makes a built-in policy that asks `then`, which may be a Python policy.
fn link<T: PyClass<BaseType = PyBuiltin>>(
    class: T,
    made: (&'static str, Vec<String>),
    then: Option<&Bound<'_, PyAny>>,
    make: impl FnOnce(Arc<dyn Policy>) -> Option<Arc<dyn Policy>>,
    wrong: &str,
) -> Made<T>
where
    PyClassInitializer<T>: From<(T, PyBuiltin)>,
{
    let mut judge = Judge::of(then).map_err(|error| match then {
        Some(then) if errors::is_policy_error(then.py(), &error) => {
            errors::policy_error(then.py(), format!("then: {}", error.value(then.py())))
        }
        _ => error,
    })?;
    judge.length += 1;
    if judge.length > LONGEST {
        return Err(PyValueError::new_err(format!("a chain has {LONGEST} policies at most")));
    }
    let policy = make(judge.policy.clone()).ok_or_else(|| PyValueError::new_err(wrong.to_owned()))?;
    judge.policy = policy;
    Ok((class, PyBuiltin::new(judge, made)).into())
}

/// Ranges as they are written in Python.
fn written(ranges: &[(u64, u64)]) -> String {
    let one = |(gpa, size): &(u64, u64)| format!("({gpa:#x}, {size:#x})");
    format!("[{}]", ranges.iter().map(one).collect::<Vec<_>>().join(", "))
}

/// Converts whatever the guest asks for. It protects nothing.
#[pyclass(name = "Allow", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyAllow;

#[pymethods]
impl PyAllow {
    #[new]
    fn new() -> Made<Self> {
        let made = ("Allow", vec![]);
        link(Self, made, None, |_| Some(Arc::new(Allow)), "")
    }
}

/// Refuses every request, as ``Deny(errno)`` does. ``errno`` is in 1..=4095, else ValueError.
#[pyclass(name = "DenyAll", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyDenyAll;

#[pymethods]
impl PyDenyAll {
    #[new]
    #[pyo3(signature = (errno = EINVAL), text_signature = "(errno=22)")]
    fn new(#[pyo3(from_py_with = arguments::integer::<arguments::named::errno, _>)] errno: i32) -> Made<Self> {
        let made = ("DenyAll", vec![errno.to_string()]);
        let make = |_| -> Option<Arc<dyn Policy>> {
            (1..=4095)
                .contains(&errno)
                .then(|| Arc::new(DenyAll { errno: Errno(errno) }) as Arc<dyn Policy>)
        };
        link(Self, made, None, make, "errno must be in 1..=4095")
    }
}

/// Converts explicit requests as asked, and refuses implicit ones, which may be guest bugs.
///
/// An implicit request ends the run as "denied".
#[pyclass(name = "ExplicitOnly", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyExplicitOnly;

#[pymethods]
impl PyExplicitOnly {
    #[new]
    fn new() -> Made<Self> {
        let made = ("ExplicitOnly", vec![]);
        link(Self, made, None, |_| Some(Arc::new(ExplicitOnly)), "")
    }
}

/// Widens what ``then`` converts to whole blocks of ``size`` bytes.
///
/// For guests that touch page after page: one exit for each block in place of one for each page. ``size`` is a power of
/// two, at least 4096, else ValueError. Every page of the block that changes state loses its bytes, so it is only for
/// guests that keep all pages of a block in one state.
///
/// The range is widened when the whole chain has decided, so the order of the chain does not matter: as far as memory
/// and every ``Window`` go, and not at all if a ``Quota`` or a listener refuses the widened range. An answer of
/// ``then`` that is no decision is an error here too.
#[pyclass(name = "Align", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyAlign;

#[pymethods]
impl PyAlign {
    #[new]
    #[pyo3(signature = (size, then = None))]
    fn new(
        #[pyo3(from_py_with = sizes::size::<arguments::named::size, _>)] size: u64,
        then: Option<&Bound<'_, PyAny>>,
    ) -> Made<Self> {
        let made = ("Align", vec![format!("{size:#x}")]);
        let make = |then| Align::new(size, then).map(|policy| Arc::new(policy) as Arc<dyn Policy>);
        link(Self, made, then, make, "size must be a power of two and at least 4096")
    }
}

/// Refuses conversions after which more than ``max_shared`` bytes would be shared.
///
/// Bounds what a guest can expose. The bytes are counted with the pages locked, so that requests of several vCPUs
/// cannot exceed it together. An explicit request gets EINVAL in RAX, an implicit one ends the run as "denied". What
/// only ``Align`` added to a request is left out instead.
#[pyclass(name = "Quota", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyQuota;

#[pymethods]
impl PyQuota {
    #[new]
    #[pyo3(signature = (max_shared, then = None))]
    fn new(
        #[pyo3(from_py_with = sizes::size::<arguments::named::max_shared, _>)] max_shared: u64,
        then: Option<&Bound<'_, PyAny>>,
    ) -> Made<Self> {
        let made = ("Quota", vec![format!("{max_shared:#x}")]);
        link(Self, made, then, |then| Some(Arc::new(Quota { max_shared, then })), "")
    }
}

/// Lets pages become shared only inside one of ``ranges``.
///
/// Each is ``(gpa, size)`` in bytes, "GPA+SIZE", or a ``range`` of addresses, which may also be given alone.
///
/// For guests whose shared buffers lie in one place, such as a swiotlb window. Elsewhere an explicit request gets
/// EINVAL in RAX, and an implicit one ends the run as "denied". Conversions to private are left to ``then``.
/// Addresses and sizes are multiples of 4096, else ValueError.
///
/// Nor does ``Align`` widen a conversion to shared past the first of the ranges that holds it, wherever it is in the
/// chain.
#[pyclass(name = "Window", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyWindow;

#[pymethods]
impl PyWindow {
    #[new]
    #[pyo3(signature = (ranges, then = None))]
    fn new(
        #[pyo3(from_py_with = sizes::ranges)] ranges: Vec<(u64, u64)>,
        then: Option<&Bound<'_, PyAny>>,
    ) -> Made<Self> {
        let made = ("Window", vec![written(&ranges)]);
        let ranges: Option<Vec<Range>> = ranges.into_iter().map(|(gpa, size)| Range::new(gpa, size)).collect();
        let make = |then| ranges.map(|ranges| Arc::new(Window { ranges, then }) as Arc<dyn Policy>);
        link(
            Self,
            made,
            then,
            make,
            "each of ranges must begin and end at a multiple of 4096, and not be empty",
        )
    }
}

/// Lets ``per_second`` requests through on average, and ``burst`` at once.
///
/// Bounds the work that a guest's requests cause on the host. A request above the rate does not reach ``then``: an
/// explicit one gets EAGAIN in RAX, an implicit one makes its vCPU wait. ``per_second`` is above 0 and ``burst`` at
/// least 1, else ValueError.
#[pyclass(name = "RateLimit", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyRateLimit;

#[pymethods]
impl PyRateLimit {
    #[new]
    #[pyo3(signature = (per_second, burst = 1, then = None))]
    fn new(
        #[pyo3(from_py_with = arguments::real::<arguments::named::per_second>)] per_second: f64,
        #[pyo3(from_py_with = arguments::integer::<arguments::named::burst, _>)] burst: u32,
        then: Option<&Bound<'_, PyAny>>,
    ) -> Made<Self> {
        let made = ("RateLimit", vec![per_second.to_string(), burst.to_string()]);
        let make = |then| RateLimit::new(per_second, burst, then).map(|policy| Arc::new(policy) as Arc<dyn Policy>);
        link(
            Self,
            made,
            then,
            make,
            "per_second must be a positive number and burst at least 1",
        )
    }
}

/// Ends the run when a page is asked for in alternating states more than ``limit`` times in ``window`` seconds.
///
/// For pages that two owners in the guest fight over. The report's reason says which page, how often it changed
/// direction and in what time. A page that is converted with others, as ``Align`` does it, counts as one that was asked
/// for. The last 256 ranges are watched. ``limit`` is in 1..=65536 and ``window`` not negative, else ValueError.
#[pyclass(name = "PingPong", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyPingPong;

#[pymethods]
impl PyPingPong {
    #[new]
    #[pyo3(signature = (limit, window, then = None))]
    fn new(
        #[pyo3(from_py_with = arguments::integer::<arguments::named::limit, _>)] limit: usize,
        #[pyo3(from_py_with = arguments::real::<arguments::named::window>)] window: f64,
        then: Option<&Bound<'_, PyAny>>,
    ) -> Made<Self> {
        let made = ("PingPong", vec![limit.to_string(), window.to_string()]);
        let window = Duration::try_from_secs_f64(window).ok();
        let make = |then| {
            let policy = PingPong::new(limit, window?, then)?;
            Some(Arc::new(policy) as Arc<dyn Policy>)
        };
        link(
            Self,
            made,
            then,
            make,
            "limit must be in 1..=65536 and window a number of seconds, not negative",
        )
    }
}
