//! A policy on trial: requests that no guest made, and a map of what would come of them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pagegate_core::attributes::{AttributeMap, PAGE_SIZE, Range, State};
use pagegate_core::errno::{EINVAL, Errno};
use pagegate_core::error::{Error, Failure, Site};
use pagegate_core::policies::Request;
use pagegate_core::policy::{Conversion, Decision, Fault};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::fields::Standing;
use crate::policy::{Judge, forget_requests};
use crate::request::{PyMapGpaRange, PyMemoryFault, PyMemoryPoison};
use crate::{decision, errors, names};

/// Asks a policy as a machine does, without one, and carries its decisions out on a map of states.
#[pyclass(name = "Trial", module = "pagegate.testing", frozen)]
pub(crate) struct PyTrial {
    judge: Judge,
    memory: u64,
    map: Mutex<AttributeMap>,
}

impl PyTrial {
    /// Never held while a policy is asked, which may be Python code that looks at the map.
    fn map(&self) -> MutexGuard<'_, AttributeMap> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, gpa: u64, size: u64) -> Option<Range> {
        Range::new(gpa, size).filter(|range| range.end() <= self.memory)
    }

    fn inside(&self, range: Range) -> PyResult<Range> {
        match range.end() <= self.memory {
            true => Ok(range),
            false => Err(self.outside(range.gpa(), range.size())),
        }
    }

    fn outside(&self, gpa: u64, size: u64) -> PyErr {
        let memory = self.memory;
        PyValueError::new_err(format!(
            "{gpa:#x} + {size:#x} is no page-aligned part of {memory:#x} bytes of memory"
        ))
    }

    /// A decision on a request for pages: what the machine would make of it.
    fn carry_out(&self, request: Request<'_>, decision: Decision) -> Result<Decision, Failure> {
        let conversion = match decision {
            Decision::Convert(conversion) => conversion,
            Decision::Discard => return Err("Discard() is an answer to memory_poison only".into()),
            decision => return Ok(decision),
        };
        let (asked, to) = (request.range(), conversion.to.unwrap_or(request.to()));
        let gpa = conversion.gpa.unwrap_or(asked.gpa());
        let size = conversion.size.unwrap_or(asked.size());
        let memory = self.memory;
        let range = self.range(gpa, size).ok_or_else(|| {
            format!("Convert: {gpa:#x} + {size:#x} is no page-aligned part of {memory:#x} bytes of memory")
        })?;
        let mut map = self.map();
        if to == State::Shared && over_quota(&map, range, &conversion) {
            return Ok(Decision::Deny(Errno(EINVAL)));
        }
        map.set(range, to);
        Ok(Decision::Convert(conversion))
    }

    fn fault(&self, fault: &Fault) -> Result<Decision, Failure> {
        let decision = self.judge.policy.memory_fault(fault)?;
        self.carry_out(Request::Implicit(fault), decision)
    }

    fn poison(&self, poison: &Fault) -> Result<Decision, Failure> {
        match self.judge.policy.memory_poison(poison)? {
            Decision::Convert(_) => {
                Err("memory_poison cannot answer Convert: a conversion does not repair a poisoned page".into())
            }
            decision => Ok(decision),
        }
    }
}

fn over_quota(map: &AttributeMap, range: Range, conversion: &Conversion) -> bool {
    let Some(most) = conversion.max_shared else {
        return false;
    };
    let private: u64 = map
        .runs_in(range)
        .filter(|run| run.state == State::Private)
        .map(|run| run.range.size())
        .sum();
    map.size() - map.private_bytes() + private > most
}

#[pymethods]
impl PyTrial {
    #[new]
    fn new(
        policy: Option<&Bound<'_, PyAny>>,
        #[pyo3(from_py_with = names::u64)] memory: u64,
        initial: &str,
    ) -> PyResult<Self> {
        // Room for the page behind the last one.
        if Range::new(0, memory).is_none() || memory > 1 << 52 {
            return Err(PyValueError::new_err(format!(
                "memory is {memory:#x}: it must be a positive multiple of {PAGE_SIZE}, at most 4 PiB"
            )));
        }
        let initial = names::state(initial, "initial")?;
        Ok(Self {
            judge: Judge::of(policy)?,
            memory,
            map: Mutex::new(AttributeMap::new(memory, initial)),
        })
    }

    /// What the policy decides; what it converts is converted here. ValueError for a request outside memory.
    fn judge(&self, py: Python<'_>, request: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let (answer, site) = if let Ok(call) = request.cast::<PyMapGpaRange>() {
            let call = call.get().call(self.memory)?;
            self.inside(call.range)?;
            let answer = self.judge.policy.map_gpa_range(&call);
            let answer = answer.and_then(|decision| self.carry_out(Request::Explicit(&call), decision));
            let state = Standing::from(call.state).as_str();
            (answer, site(call.vcpu, call.range, state, 0))
        } else {
            let poison = request.is_instance_of::<PyMemoryPoison>();
            let fault = request.cast::<PyMemoryFault>()?.get().fault(self.memory)?;
            self.inside(fault.range)?;
            let answer = match poison {
                true => self.poison(&fault),
                false => self.fault(&fault),
            };
            (answer, site(fault.vcpu, fault.range, fault.state.as_str(), fault.rip))
        };
        // This thread may ask never again.
        forget_requests(py);
        match answer {
            Ok(decision) => decision::write(py, decision),
            Err(failure) => Err(errors::raise(py, Error::Hook { site, failure })),
        }
    }

    /// The state of a range of whole pages: "private", "shared" or "mixed".
    fn state(
        &self,
        #[pyo3(from_py_with = names::u64)] gpa: u64,
        #[pyo3(from_py_with = names::u64)] size: u64,
    ) -> PyResult<&'static str> {
        let range = self.range(gpa, size).ok_or_else(|| self.outside(gpa, size))?;
        Ok(Standing::from(self.map().uniform(range)).as_str())
    }

    /// Maximal runs of one state as ``(gpa, size, state)``, ascending.
    fn runs(&self) -> Vec<(u64, u64, &'static str)> {
        let map = self.map();
        let runs = map.runs();
        runs.map(|run| (run.range.gpa(), run.range.size(), run.state.as_str()))
            .collect()
    }

    /// Bytes that are shared.
    #[getter]
    fn shared_bytes(&self) -> u64 {
        self.memory - self.map().private_bytes()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.judge.traverse(&visit)
    }
}

fn site(vcpu: u32, range: Range, state: &'static str, rip: u64) -> Site {
    Site {
        vcpu,
        gpa: Some(range.gpa()),
        state: Some(state),
        rip,
    }
}
