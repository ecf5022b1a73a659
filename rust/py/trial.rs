//! A policy on trial: requests that no guest made, and a map of what would come of them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pagegate_core::attributes::{PAGE_SIZE, Range};
use pagegate_core::error::{Error, Failure, Site};
use pagegate_core::model::{self, Model};
use pagegate_core::policies::Request;
use pagegate_core::policy::{Decision, Fault};
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
    model: Mutex<Model>,
}

impl PyTrial {
    /// Never held while a policy is asked, which may be Python code that looks at the states.
    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn carry_out(&self, request: Request<'_>, decision: Decision) -> Result<Decision, Failure> {
        Ok(self.model().carry_out(request, decision)?.decision)
    }

    fn fault(&self, fault: &Fault) -> Result<Decision, Failure> {
        let decision = self.judge.policy.memory_fault(fault)?;
        self.carry_out(Request::Implicit(fault), decision)
    }
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
            model: Mutex::new(Model::new(memory, initial)),
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
                true => model::poison(self.judge.policy.as_ref(), &fault),
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
        let model = self.model();
        let range = model.range(gpa, size).ok_or_else(|| self.outside(gpa, size))?;
        Ok(Standing::from(model.map().uniform(range)).as_str())
    }

    /// Maximal runs of one state as ``(gpa, size, state)``, ascending.
    fn runs(&self) -> Vec<(u64, u64, &'static str)> {
        let model = self.model();
        let runs = model.map().runs();
        runs.map(|run| (run.range.gpa(), run.range.size(), run.state.as_str()))
            .collect()
    }

    /// Bytes that are shared.
    #[getter]
    fn shared_bytes(&self) -> u64 {
        self.model().shared_bytes()
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
