//! One request, from exit to resume.

use pagegate_core::events::event::Event;
use pyo3::prelude::*;

use crate::interpreter::fields::RangeState;

/// One request, from exit to resume.
#[pyclass(name = "Event", module = "pagegate", frozen, get_all, eq)]
#[derive(PartialEq, Eq)]
pub(crate) struct PyEvent {
    /// Position in the log, from 0: in the order in which requests were over.
    sequence: u64,
    /// When it came: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``; the order of the questions.
    time: u64,
    vcpu: u32,
    kind: &'static str,
    /// What was asked for: start in bytes.
    gpa: u64,
    /// What was asked for: bytes.
    size: u64,
    /// What was asked for: the state.
    to: &'static str,
    /// The state that the pages were in.
    state: &'static str,
    /// Explicit: the guest's hint in bytes; else 0.
    page_size: u32,
    /// Explicit: RDX; else 0.
    raw: u32,
    /// Implicit: KVM_MEMORY_EXIT_FLAG_*; else 0.
    flags: u32,
    /// Implicit: the guest's instruction pointer; else 0.
    rip: u64,
    /// Implicit: how often this very fault came before, with no change in between; else 0.
    repeats: u32,
    /// What the policy decided; "none" if it failed.
    decision: &'static str,
    /// What was to be converted: start in bytes; 0 for all decisions but "convert".
    decision_gpa: u64,
    /// What was to be converted: bytes; 0 for all decisions but "convert".
    decision_size: u64,
    /// What it was to be converted to.
    decision_to: &'static str,
    /// The decision said ``prefault=True``.
    decision_prefault: bool,
    /// The decision did not say ``discard=False``.
    decision_discard: bool,
    /// The errno of a "deny"; else 0.
    decision_errno: i32,
    outcome: &'static str,
    /// What was converted: start in bytes.
    done_gpa: u64,
    /// What was converted: bytes; 0 for nothing.
    done_size: u64,
    /// What it was converted to.
    done_to: &'static str,
    /// Bytes whose state really changed.
    changed: u64,
    /// What the guest was told: 0, or a positive errno.
    errno: i32,
    /// Exit to resume in nanoseconds.
    latency: u64,
}

impl From<Event> for PyEvent {
    fn from(event: Event) -> Self {
        let decision = event.decision;
        Self {
            sequence: event.sequence,
            time: event.time,
            vcpu: event.vcpu,
            kind: event.kind.as_str(),
            gpa: event.gpa,
            size: event.size,
            to: event.to.as_str(),
            state: RangeState::from(event.state).as_str(),
            page_size: event.page_size,
            raw: event.raw,
            flags: event.flags,
            rip: event.rip,
            repeats: event.repeats,
            decision: decision.verdict.as_str(),
            decision_gpa: decision.gpa,
            decision_size: decision.size,
            decision_to: decision.to.as_str(),
            decision_prefault: decision.prefault,
            decision_discard: decision.discard,
            decision_errno: decision.errno,
            outcome: event.outcome.as_str(),
            done_gpa: event.done_gpa,
            done_size: event.done_size,
            done_to: event.done_to.as_str(),
            changed: event.changed,
            errno: event.errno,
            latency: event.latency,
        }
    }
}

#[pymethods]
impl PyEvent {
    fn __repr__(&self) -> String {
        let Self {
            sequence,
            vcpu,
            kind,
            gpa,
            size,
            to,
            outcome,
            ..
        } = self;
        format!(
            "Event(sequence={sequence}, vcpu={vcpu}, kind={kind:?}, gpa={gpa:#x}, size={size:#x}, to={to:?}, \
             outcome={outcome:?})"
        )
    }
}
