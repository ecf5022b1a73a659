//! A Python policy, as a policy of the core.

use std::sync::atomic::{AtomicU64, Ordering};

use pagegate_core::error::Failure;
use pagegate_core::memory::address::{Range, State};
use pagegate_core::policy::decision::Decision;
use pagegate_core::policy::device_access::DeviceAccess;
use pagegate_core::policy::filter::Filter;
use pagegate_core::policy::hooks::Policy;
use pagegate_core::policy::request::{ExplicitRequest, ImplicitRequest, Request};
use pagegate_core::policy::simple::Allow;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::decision;
use super::device_access::PyDeviceAccess;
use super::request::{PyMapGpaRange, PyMemoryFault, PyMemoryPoison};
use crate::interpreter::attach::attached;
use crate::interpreter::{call, judged, reuse};

type Hook = Option<Py<PyAny>>;

/// A hook that judges, and which requests it is asked about, `None` for all; the others are left to the default.
type Judging = Option<(Py<PyAny>, Option<Filter>)>;

/// A hook that is called around runs, by its place in `pagegate.hooks.LIFECYCLE`.
#[derive(Clone, Copy)]
pub(crate) enum Moment {
    /// Once for each machine, before a request can be put to the policy.
    Configure,
    /// A run is about to begin.
    Running,
    /// A run is over.
    Done,
}

/// A policy's hooks, looked up once.
pub(crate) struct PyPolicy {
    memory_fault: Judging,
    map_gpa_range: Judging,
    memory_poison: Hook,
    device_access: Hook,
    lifecycle: [Hook; 3],
    /// Requests that it was asked about.
    asked: AtomicU64,
}

impl PyPolicy {
    /// Finds and validates the hooks of any object.
    pub(super) fn resolve(policy: &Bound<'_, PyAny>) -> PyResult<Self> {
        let resolve = policy.py().import("pagegate.hooks")?.getattr("resolve_all")?;
        let resolved: (Vec<Hook>, Vec<Hook>, Vec<Option<PyFilter>>) = call::call(&resolve, policy)?.extract()?;
        let (judging, lifecycle, filters) = resolved;
        let wrong = |_| PyValueError::new_err("resolve() returns a hook for each name");
        let [memory_fault, map_gpa_range, memory_poison, device_access] =
            <[Hook; 4]>::try_from(judging).map_err(wrong)?;
        let [of_fault, of_call] = <[Option<PyFilter>; 2]>::try_from(filters).map_err(|_| wrong(Vec::new()))?;
        let filter = |filter: Option<PyFilter>| filter.map(PyFilter::read).transpose();
        let (of_fault, of_call) = (filter(of_fault)?, filter(of_call)?);
        Ok(Self {
            memory_fault: memory_fault.map(|hook| (hook, of_fault)),
            map_gpa_range: map_gpa_range.map(|hook| (hook, of_call)),
            memory_poison,
            device_access,
            lifecycle: <[Hook; 3]>::try_from(lifecycle).map_err(wrong)?,
            asked: AtomicU64::new(0),
        })
    }

    /// The hooks, in the order of `pagegate.hooks.NAMES`.
    pub(crate) fn cloned(&self, py: Python<'_>) -> [Hook; 4] {
        self.all().map(|hook| hook.map(|hook| hook.clone_ref(py)))
    }

    /// Whether it has a hook that judges.
    pub(crate) fn judges(&self) -> bool {
        self.all().into_iter().flatten().next().is_some()
    }

    /// The hooks that it has, of both kinds.
    pub(crate) fn hooks(&self) -> impl Iterator<Item = &Py<PyAny>> {
        self.all()
            .into_iter()
            .chain(self.lifecycle.each_ref().map(Option::as_ref))
            .flatten()
    }

    fn all(&self) -> [Option<&Py<PyAny>>; 4] {
        [
            self.memory_fault.as_ref().map(|(hook, _)| hook),
            self.map_gpa_range.as_ref().map(|(hook, _)| hook),
            self.memory_poison.as_ref(),
            self.device_access.as_ref(),
        ]
    }

    /// Calls a hook of its lifecycle, if it has that one, on the caller's thread.
    pub(crate) fn tell(&self, moment: Moment, argument: &Bound<'_, PyAny>) -> PyResult<()> {
        match &self.lifecycle[moment as usize] {
            Some(hook) => call::call(hook.bind(argument.py()), argument).map(drop),
            None => Ok(()),
        }
    }

    /// Requests that it was asked about.
    pub(crate) fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    fn ask<T: reuse::HookArgument>(
        &self,
        hook: &Py<PyAny>,
        name: &'static str,
        question: &T::Question,
    ) -> Result<Decision, Failure> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        attached(|py| {
            let answer = reuse::call::<T>(hook.bind(py), question)?;
            decision::read(&answer, name)
        })
    }
}

/// The conditions of `pagegate.only`: to, pages, least, most, vcpus. They are checked there.
#[derive(FromPyObject)]
struct PyFilter(Option<bool>, Vec<(u64, u64)>, u64, Option<u64>, Vec<u32>);

impl PyFilter {
    fn read(self) -> PyResult<Filter> {
        let Self(private, pages, least, most, vcpus) = self;
        let range = |(gpa, size)| {
            Range::new(gpa, size).ok_or_else(|| {
                PyValueError::new_err(format!("only(): {gpa:#x} + {size:#x} is no range of whole pages"))
            })
        };
        Ok(Filter {
            to: private.map(|private| if private { State::Private } else { State::Shared }),
            pages: pages.into_iter().map(range).collect::<PyResult<_>>()?,
            least,
            most,
            vcpus,
        })
    }
}

#[inline]
fn wants(filter: &Option<Filter>, request: Request<'_>) -> bool {
    filter.as_ref().is_none_or(|filter| filter.wants(request))
}

/// Asks about a poisoned page. That is rare, so the object is not reused and the request not counted.
fn ask_about_poison(hook: &Py<PyAny>, poison: &ImplicitRequest) -> Result<Decision, Failure> {
    attached(|py| {
        let request = Bound::new(py, PyMemoryPoison::of(poison))?;
        let _judging = judged::judging(&request);
        let answer = call::call(hook.bind(py), request.as_any())?;
        decision::read(&answer, "memory_poison")
    })
}

/// Asks about a device's access to what is not shared, which is rare, too.
fn ask_about_device(hook: &Py<PyAny>, access: &DeviceAccess) -> Result<Decision, Failure> {
    attached(|py| {
        let access = Bound::new(py, PyDeviceAccess::from(access))?;
        let answer = call::call(hook.bind(py), access.as_any())?;
        decision::read(&answer, "device_access")
    })
}

/// Frees the objects that this thread keeps for calling hooks. Called when it may not call hooks again.
pub(crate) fn forget_requests(_attached: Python<'_>) {
    reuse::forget::<PyMemoryFault>();
    reuse::forget::<PyMapGpaRange>();
}

impl Policy for PyPolicy {
    fn memory_fault(&self, fault: &ImplicitRequest) -> Result<Decision, Failure> {
        match &self.memory_fault {
            Some((hook, filter)) if wants(filter, Request::Implicit(fault)) => {
                self.ask::<PyMemoryFault>(hook, "memory_fault", fault)
            }
            _ => Allow.memory_fault(fault),
        }
    }

    fn map_gpa_range(&self, call: &ExplicitRequest) -> Result<Decision, Failure> {
        match &self.map_gpa_range {
            Some((hook, filter)) if wants(filter, Request::Explicit(call)) => {
                self.ask::<PyMapGpaRange>(hook, "map_gpa_range", call)
            }
            _ => Allow.map_gpa_range(call),
        }
    }

    fn wants(&self, request: Request<'_>) -> bool {
        let hook = match request {
            Request::Implicit(_) => &self.memory_fault,
            Request::Explicit(_) => &self.map_gpa_range,
        };
        hook.as_ref().is_some_and(|(_, filter)| wants(filter, request))
    }

    fn memory_poison(&self, poison: &ImplicitRequest) -> Result<Decision, Failure> {
        match &self.memory_poison {
            Some(hook) => ask_about_poison(hook, poison),
            None => Allow.memory_poison(poison),
        }
    }

    fn device_access(&self, access: &DeviceAccess) -> Result<Decision, Failure> {
        match &self.device_access {
            Some(hook) => ask_about_device(hook, access),
            None => Allow.device_access(access),
        }
    }
}
