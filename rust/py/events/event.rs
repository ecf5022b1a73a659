//! One row of the log as a Python object.

use pagegate_core::events::event::Event;
use pyo3::prelude::*;

use crate::interpreter::fields::RangeState;

/// One request: what was asked for, decided and done.
#[pyclass(name = "Event", module = "pagegate", frozen, get_all, eq)]
#[derive(PartialEq, Eq)]
pub(crate) struct PyEvent {
    /// Number in the log, from 0, in the order in which requests were completed.
    sequence: u64,
    /// When the vCPU exited: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``.
    time: u64,
    /// Index of the vCPU.
    vcpu: u32,
    /// How it came: by an access, by KVM_HC_MAP_GPA_RANGE, or by an access to a poisoned page.
    kind: &'static str,
    /// Start of the pages that were asked for, in bytes.
    gpa: u64,
    /// Bytes that were asked for.
    size: u64,
    /// The state that was asked for; for a poisoned page the accessed one.
    to: &'static str,
    /// The state of the pages when the policy was asked.
    state: &'static str,
    /// The guest's page size hint in bytes; 0 unless explicit.
    page_size: u32,
    /// RDX; 0 unless explicit.
    raw: u32,
    /// KVM_MEMORY_EXIT_FLAG_*; 0 if explicit.
    flags: u32,
    /// The guest's instruction pointer; 0 if explicit.
    rip: u64,
    /// How often this same fault came before, in a row, with no change of its page; 0 if explicit.
    repeats: u32,
    /// What the policy decided; "none" if its hook failed.
    decision: &'static str,
    /// Start of what was to be converted, in bytes; 0 unless the decision is "convert".
    decision_gpa: u64,
    /// Bytes that were to be converted; 0 unless the decision is "convert".
    decision_size: u64,
    /// The state to convert to; the one asked for unless the decision is "convert".
    decision_to: &'static str,
    /// Whether the decision was a ``Convert(prefault=True)``.
    decision_prefault: bool,
    /// Whether the decision was to convert and to free the old side (``discard=True``).
    decision_discard: bool,
    /// The errno of a "deny"; else 0.
    decision_errno: i32,
    /// What came of the request.
    ///
    /// "superseded": another vCPU had converted the page meanwhile. "failed": no decision, or a conversion that failed.
    outcome: &'static str,
    /// Start of what was converted, in bytes.
    done_gpa: u64,
    /// Bytes that were converted; 0 if nothing was.
    done_size: u64,
    /// The state that it was converted to.
    done_to: &'static str,
    /// Bytes whose state changed; those that were in that state already are not counted.
    changed: u64,
    /// What an explicit request got in RAX: 0, or a positive errno. For the others: that of a refusal, or 0.
    errno: i32,
    /// Nanoseconds from exit to resume.
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
