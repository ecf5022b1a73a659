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
use crate::interpreter::arguments;

type Made<T> = PyResult<PyClassInitializer<T>>;

/// A link around whatever `then` is.
fn link<T: PyClass<BaseType = PyBuiltin>>(
    class: T,
    then: Option<&Bound<'_, PyAny>>,
    make: impl FnOnce(Arc<dyn Policy>) -> Option<Arc<dyn Policy>>,
    wrong: &str,
) -> Made<T>
where
    PyClassInitializer<T>: From<(T, PyBuiltin)>,
{
    let mut judge = Judge::of(then)?;
    let policy = make(judge.policy.clone()).ok_or_else(|| PyValueError::new_err(wrong.to_owned()))?;
    judge.policy = policy;
    Ok((class, PyBuiltin(judge)).into())
}

/// Converts whatever is asked for. It protects against nothing: the guest decides.
#[pyclass(name = "Allow", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyAllow;

#[pymethods]
impl PyAllow {
    #[new]
    fn new() -> Made<Self> {
        link(Self, None, |_| Some(Arc::new(Allow)), "")
    }
}

/// Refuses everything: no page changes hands. ``errno`` is in 1..=4095.
#[pyclass(name = "DenyAll", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyDenyAll;

#[pymethods]
impl PyDenyAll {
    #[new]
    #[pyo3(signature = (errno = EINVAL), text_signature = "(errno=22)")]
    fn new(errno: i32) -> Made<Self> {
        let make = |_| -> Option<Arc<dyn Policy>> {
            (1..=4095)
                .contains(&errno)
                .then(|| Arc::new(DenyAll { errno: Errno(errno) }) as Arc<dyn Policy>)
        };
        link(Self, None, make, "errno must be in 1..=4095")
    }
}

/// Converts what is asked for in so many words, and refuses what is merely touched, which may be a guest bug.
#[pyclass(name = "ExplicitOnly", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyExplicitOnly;

#[pymethods]
impl PyExplicitOnly {
    #[new]
    fn new() -> Made<Self> {
        link(Self, None, |_| Some(Arc::new(ExplicitOnly)), "")
    }
}

/// Widens what ``then`` converts to whole blocks of ``size`` bytes, as far as memory goes.
///
/// Against a storm of exits: one for a block in place of one for each page. ``size`` is a power of two from 4096 on.
/// Every page of the block that changes state loses its bytes, so this is for guests that use whole blocks alike.
#[pyclass(name = "Align", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyAlign;

#[pymethods]
impl PyAlign {
    #[new]
    #[pyo3(signature = (size, then = None))]
    fn new(#[pyo3(from_py_with = arguments::integer)] size: u64, then: Option<&Bound<'_, PyAny>>) -> Made<Self> {
        let make = |then| Align::new(size, then).map(|policy| Arc::new(policy) as Arc<dyn Policy>);
        link(Self, then, make, "size must be a power of two and at least 4096")
    }
}

/// Refuses conversions after which more than ``max_shared`` bytes would be shared.
///
/// Against a guest that exposes itself bit by bit. It is counted with the pages locked, so that no two vCPUs slip
/// through together. An explicit request finds EINVAL, an implicit one ends the run as "denied".
#[pyclass(name = "Quota", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyQuota;

#[pymethods]
impl PyQuota {
    #[new]
    #[pyo3(signature = (max_shared, then = None))]
    fn new(#[pyo3(from_py_with = arguments::integer)] max_shared: u64, then: Option<&Bound<'_, PyAny>>) -> Made<Self> {
        link(Self, then, |then| Some(Arc::new(Quota { max_shared, then })), "")
    }
}

/// Lets pages become shared inside ``ranges`` only, ``(gpa, size)`` in bytes; EINVAL elsewhere.
///
/// Against sharing anything but the buffers that are meant for it, such as a swiotlb window.
#[pyclass(name = "Window", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyWindow;

#[pymethods]
impl PyWindow {
    #[new]
    #[pyo3(signature = (ranges, then = None))]
    fn new(ranges: Vec<(u64, u64)>, then: Option<&Bound<'_, PyAny>>) -> Made<Self> {
        let ranges: Option<Vec<Range>> = ranges.into_iter().map(|(gpa, size)| Range::new(gpa, size)).collect();
        let make = |then| ranges.map(|ranges| Arc::new(Window { ranges, then }) as Arc<dyn Policy>);
        link(
            Self,
            then,
            make,
            "ranges must be (gpa, size) in bytes, both multiples of 4096, size above 0",
        )
    }
}

/// Lets ``per_second`` requests through on average and ``burst`` at once.
///
/// Against a guest that keeps the host busy converting. An explicit request above that finds EAGAIN, an implicit one
/// waits, which slows down its own vCPU.
#[pyclass(name = "RateLimit", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyRateLimit;

#[pymethods]
impl PyRateLimit {
    #[new]
    #[pyo3(signature = (per_second, burst = 1, then = None))]
    fn new(
        per_second: f64,
        #[pyo3(from_py_with = arguments::integer)] burst: u32,
        then: Option<&Bound<'_, PyAny>>,
    ) -> Made<Self> {
        let make = |then| RateLimit::new(per_second, burst, then).map(|policy| Arc::new(policy) as Arc<dyn Policy>);
        link(
            Self,
            then,
            make,
            "per_second must be a positive number and burst at least 1",
        )
    }
}

/// Ends the run when a page is asked for in alternating states more than ``limit`` times in ``window`` seconds.
///
/// Against two owners that fight over a page. The report's reason is the evidence: which page, how often, how fast.
#[pyclass(name = "PingPong", module = "pagegate.policies", frozen, extends = PyBuiltin)]
pub(crate) struct PyPingPong;

#[pymethods]
impl PyPingPong {
    #[new]
    #[pyo3(signature = (limit, window, then = None))]
    fn new(
        #[pyo3(from_py_with = arguments::integer)] limit: usize,
        window: f64,
        then: Option<&Bound<'_, PyAny>>,
    ) -> Made<Self> {
        let window = Duration::try_from_secs_f64(window).ok();
        let make = |then| {
            let policy = PingPong::new(limit, window?, then)?;
            Some(Arc::new(policy) as Arc<dyn Policy>)
        };
        link(
            Self,
            then,
            make,
            "limit must be in 1..=65536 and window a number of seconds, not negative",
        )
    }
}
