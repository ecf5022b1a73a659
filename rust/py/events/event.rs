//! One row of the log as a Python object.

use std::sync::LazyLock;

use arrow_schema::SchemaRef;
use pagegate_core::events::event::{Event, Kind, Outcome, Verdict};
use pagegate_core::events::table::schema;
use pagegate_core::memory::address::State;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PySlice};

use crate::interpreter::arguments;
use crate::interpreter::fields::RangeState;
use crate::interpreter::record::{self, Fields};

/// One request: what was asked for, decided and done.
///
/// One can be made from all of its fields, as ``asdict`` gives them; TypeError if they are not these.
#[pyclass(name = "Event", module = "pagegate", frozen, get_all, eq)]
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PyEvent {
    /// Number in the log, from 0, in the order in which requests were completed.
    sequence: u64,
    /// When the vCPU exited: nanoseconds of CLOCK_MONOTONIC, as ``time.monotonic_ns()``.
    time: u64,
    /// Index of the vCPU; 0xffffffff for what no vCPU did: "device", and "missing" if another touched the page.
    vcpu: u32,
    /// How it came: by an access, by KVM_HC_MAP_GPA_RANGE, or by an access to a poisoned page.
    ///
    /// "unpaged" is no request: in a guest with ``confidential="sev"`` a private page was opened or closed to vCPUs
    /// without paging. No policy is asked, and the report does not count it. "device" is none either: a device was told
    /// to access a page that is not shared, and ``Policy.device_access`` was asked, or it accessed one that is, and its
    /// accesses are logged (``Vm.add_device``). "malformed": the guest asked for what makes no sense, such as a part of
    /// a page; no policy is asked, and ``gpa``, ``size`` and ``raw`` are as it gave them, as far as they fit.
    /// "missing": somebody touched a page that had no bytes yet; ``size`` is what came at once, ``latency`` how long
    /// its pager took.
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
    /// The guest's instruction pointer, as ``MemoryFault.rip``; 0 if explicit with ``platform="bare"``.
    rip: u64,
    /// How often this same fault came before, in a row, with no change of its page; 0 if explicit.
    repeats: u32,
    /// What the policy decided; "none" if its hook failed, and if no policy is asked.
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
    /// Of "unpaged": "opened" or "closed". Of "malformed": "refused". "accessed": a device accessed shared pages, as it
    /// was told to. Of "missing": "came", or "failed".
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
    /// Number of the device on the PCI bus; ``None`` unless "device".
    device: Option<u32>,
    /// Index of the device's queue; ``None`` unless "device".
    queue: Option<u16>,
    /// Index of the request's first descriptor; ``None`` for the queue's rings and unless "device".
    descriptor: Option<u16>,
    /// Whether the device was to write; ``None`` unless "device".
    write: Option<bool>,
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
            device: event.device.map(|by| by.number),
            queue: event.device.map(|by| by.queue),
            descriptor: event.device.and_then(|by| by.descriptor),
            write: event.device.map(|by| by.write),
        }
    }
}

/// An item of a sequence of events, or a list of them for a slice.
pub(crate) fn item<'py>(
    py: Python<'py>,
    index: &Bound<'py, PyAny>,
    len: usize,
    at: impl Fn(usize) -> Option<PyEvent>,
) -> PyResult<Bound<'py, PyAny>> {
    if let Ok(slice) = index.cast::<PySlice>() {
        let indices = slice.indices(len as isize)?;
        let place = |step: usize| usize::try_from(indices.start + step as isize * indices.step).ok();
        let events = (0..indices.slicelength).filter_map(|step| at(place(step)?));
        return Ok(PyList::new(py, events.collect::<Vec<_>>())?.into_any());
    }
    let given: i64 = arguments::integer_named(index, "the index", "0 or -1, or a slice", "")?;
    let from_end = len as i64 + given;
    let place = usize::try_from(if given < 0 { from_end } else { given }).ok();
    let event = place
        .and_then(at)
        .ok_or_else(|| PyIndexError::new_err(format!("there is no event {given}: there are {len}")))?;
    Ok(Bound::new(py, event)?.into_any())
}

/// The names of the fields: those of the table's columns.
fn names() -> Vec<&'static str> {
    static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(schema);
    SCHEMA.fields().iter().map(|field| field.name().as_str()).collect()
}

/// The words that an event's kind, decision and outcome can be, by these names.
#[pyfunction]
pub(crate) fn event_words(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let words = PyDict::new(py);
    words.set_item("kind", Kind::ALL.map(Kind::as_str))?;
    words.set_item("decision", Verdict::ALL.map(Verdict::as_str))?;
    words.set_item("outcome", Outcome::ALL.map(Outcome::as_str))?;
    Ok(words)
}

/// The word of these that a field is.
fn one_of(fields: &Fields<'_>, name: &str, words: impl IntoIterator<Item = &'static str>) -> PyResult<&'static str> {
    let word: String = fields.get(name)?;
    arguments::choose(&word, name, words.into_iter().map(|word| (word, word)))
}

#[pymethods]
impl PyEvent {
    #[new]
    #[pyo3(signature = (**fields))]
    fn new(py: Python<'_>, fields: Option<Bound<'_, PyDict>>) -> PyResult<Self> {
        let fields = Fields::of(py, fields, &names())?;
        let states = || [State::Shared, State::Private].map(State::as_str);
        let of_range = [RangeState::Shared, RangeState::Private, RangeState::Mixed].map(RangeState::as_str);
        Ok(Self {
            sequence: fields.get("sequence")?,
            time: fields.get("time")?,
            vcpu: fields.get("vcpu")?,
            kind: one_of(&fields, "kind", Kind::ALL.map(Kind::as_str))?,
            gpa: fields.get("gpa")?,
            size: fields.get("size")?,
            to: one_of(&fields, "to", states())?,
            state: one_of(&fields, "state", of_range)?,
            page_size: fields.get("page_size")?,
            raw: fields.get("raw")?,
            flags: fields.get("flags")?,
            rip: fields.get("rip")?,
            repeats: fields.get("repeats")?,
            decision: one_of(&fields, "decision", Verdict::ALL.map(Verdict::as_str))?,
            decision_gpa: fields.get("decision_gpa")?,
            decision_size: fields.get("decision_size")?,
            decision_to: one_of(&fields, "decision_to", states())?,
            decision_prefault: fields.get("decision_prefault")?,
            decision_discard: fields.get("decision_discard")?,
            decision_errno: fields.get("decision_errno")?,
            outcome: one_of(&fields, "outcome", Outcome::ALL.map(Outcome::as_str))?,
            done_gpa: fields.get("done_gpa")?,
            done_size: fields.get("done_size")?,
            done_to: one_of(&fields, "done_to", states())?,
            changed: fields.get("changed")?,
            errno: fields.get("errno")?,
            latency: fields.get("latency")?,
            device: fields.get("device")?,
            queue: fields.get("queue")?,
            descriptor: fields.get("descriptor")?,
            write: fields.get("write")?,
        })
    }

    /// Its fields by name. An equal one can be made of them.
    fn asdict<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyDict>> {
        record::asdict(slf.as_any(), &names())
    }

    fn __getnewargs_ex__<'py>(slf: &Bound<'py, Self>) -> PyResult<record::State<'py>> {
        record::state(slf.as_any(), &names())
    }

    fn __hash__(&self) -> u64 {
        self.sequence
    }

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
