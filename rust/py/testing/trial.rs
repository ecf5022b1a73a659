//! Asking a policy without a machine.

use pagegate_core::memory::address::State;
use pagegate_core::policy::trial::{Question, Trial};
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use crate::interpreter::fields::RangeState;
use crate::interpreter::{arguments, errors, sizes};
use crate::policy::decision;
use crate::policy::hooks::forget_requests;
use crate::policy::judge::Judge;
use crate::policy::request::{PyMapGpaRange, PyMemoryFault, PyMemoryPoison};

/// Asks a policy without a machine, and carries its decisions out on a map of page states.
#[pyclass(name = "Trial", module = "pagegate.testing", frozen)]
pub(crate) struct PyTrial {
    judge: Judge,
    trial: Trial,
}

#[pymethods]
impl PyTrial {
    fn __repr__(&self) -> String {
        let (shared, memory) = (self.trial.shared_bytes(), self.trial.memory());
        format!("<pagegate.testing.Trial: {shared:#x} bytes of {memory:#x} shared>")
    }

    #[new]
    fn new(
        py: Python<'_>,
        policy: Option<&Bound<'_, PyAny>>,
        #[pyo3(from_py_with = sizes::size::<arguments::StatesOnly, _>)] memory: u64,
        #[pyo3(from_py_with = arguments::state_named::<arguments::named::initial>)] initial: State,
    ) -> PyResult<Self> {
        let judge = Judge::of(policy)?;
        let trial = Trial::new(judge.policy.clone(), memory, initial);
        Ok(Self {
            judge,
            trial: trial.map_err(|error| errors::raise(py, error))?,
        })
    }

    /// Asks the policy, and converts in the map what it converts. ValueError for a request outside memory.
    fn judge(&self, py: Python<'_>, request: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let memory = self.trial.memory();
        let question = if let Ok(call) = request.cast::<PyMapGpaRange>() {
            Question::Explicit(call.get().call(memory)?)
        } else {
            let fault = request.cast::<PyMemoryFault>()?.get().fault(memory)?;
            match request.is_instance_of::<PyMemoryPoison>() {
                true => Question::Poison(fault),
                false => Question::Implicit(fault),
            }
        };
        let decision = self.trial.judge(&question);
        // This thread may never call a hook again.
        forget_requests(py);
        decision::write(py, decision.map_err(|error| errors::raise(py, error))?)
    }

    /// The state of a range of whole pages.
    fn state(
        &self,
        py: Python<'_>,
        #[pyo3(from_py_with = sizes::size::<arguments::named::gpa, _>)] gpa: u64,
        #[pyo3(from_py_with = sizes::size::<arguments::named::size, _>)] size: u64,
    ) -> PyResult<&'static str> {
        let state: Result<Option<State>, _> = self.trial.state(gpa, size);
        let state = state.map_err(|error| errors::raise(py, error))?;
        Ok(RangeState::from(state).as_str())
    }

    /// Maximal runs of one state as ``(gpa, size, state)`` in bytes, ascending.
    fn runs(&self) -> Vec<(u64, u64, &'static str)> {
        let runs = self.trial.runs().into_iter();
        runs.map(|run| (run.range.gpa(), run.range.size(), run.state.as_str()))
            .collect()
    }

    /// Bytes that are shared.
    #[getter]
    fn shared_bytes(&self) -> u64 {
        self.trial.shared_bytes()
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.judge.traverse(&visit)
    }
}
