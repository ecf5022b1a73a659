//! An event: what was asked, decided and done for one request.

use crate::errno::Errno;
use crate::memory::address::{Range, State};
use crate::policy::decision::{Convert, Decision};

/// What kind of request it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest touched a page in the wrong state.
    Implicit,
    /// The guest asked, by KVM_HC_MAP_GPA_RANGE.
    Explicit,
    /// The guest touched a poisoned page.
    Poison,
    /// A page was opened or closed to a vCPU without paging, in a software SEV guest. No policy is asked.
    Unpaged,
    /// A device was told to access a page that is not shared, or accessed what is.
    Device,
    /// The guest asked for what makes no sense. No policy is asked.
    Malformed,
    /// A page that had no bytes yet was touched. A pager is asked, and no policy.
    Missing,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 7] = [
        Kind::Implicit,
        Kind::Explicit,
        Kind::Poison,
        Kind::Unpaged,
        Kind::Device,
        Kind::Malformed,
        Kind::Missing,
    ];

    /// Its name in tables and Python.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Implicit => "implicit",
            Kind::Explicit => "explicit",
            Kind::Poison => "poison",
            Kind::Unpaged => "unpaged",
            Kind::Device => "device",
            Kind::Malformed => "malformed",
            Kind::Missing => "missing",
        }
    }

    /// Whether a policy is asked about it as a vCPU's request, live and in a replay.
    pub(crate) const fn is_request(self) -> bool {
        matches!(self, Kind::Implicit | Kind::Explicit | Kind::Poison)
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Converted, as asked or as the policy decided.
    Converted,
    /// Refused by the policy.
    Denied,
    /// The guest is to try again.
    Retried,
    /// The policy ended the run.
    Stopped,
    /// Not converted, because another vCPU changed the pages meanwhile. The guest resumes.
    Superseded,
    /// The conversion failed, or the policy did.
    Failed,
    /// The poisoned page was freed.
    Discarded,
    /// A private page's shared view shows its private bytes from now on.
    Opened,
    /// It does no more.
    Closed,
    /// A device accessed shared pages, and its accesses are logged.
    Accessed,
    /// Refused without asking the policy.
    Refused,
    /// The pager gave a missing page its bytes.
    Came,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Outcome; 12] = [
        Outcome::Converted,
        Outcome::Denied,
        Outcome::Retried,
        Outcome::Stopped,
        Outcome::Superseded,
        Outcome::Failed,
        Outcome::Discarded,
        Outcome::Opened,
        Outcome::Closed,
        Outcome::Accessed,
        Outcome::Refused,
        Outcome::Came,
    ];

    /// Its name in tables and Python.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Converted => "converted",
            Outcome::Denied => "denied",
            Outcome::Retried => "retried",
            Outcome::Stopped => "stopped",
            Outcome::Superseded => "superseded",
            Outcome::Failed => "failed",
            Outcome::Discarded => "discarded",
            Outcome::Opened => "opened",
            Outcome::Closed => "closed",
            Outcome::Accessed => "accessed",
            Outcome::Refused => "refused",
            Outcome::Came => "came",
        }
    }
}

/// The kind of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Convert.
    Convert,
    /// Deny.
    Deny,
    /// Retry or Wait.
    Retry,
    /// Discard the poisoned page.
    Discard,
    /// End the run.
    Stop,
    /// There was none: the policy failed.
    None,
}

impl Verdict {
    /// All of them.
    pub const ALL: [Verdict; 6] = [
        Verdict::Convert,
        Verdict::Deny,
        Verdict::Retry,
        Verdict::Discard,
        Verdict::Stop,
        Verdict::None,
    ];

    /// Its name in tables and Python.
    pub const fn as_str(self) -> &'static str {
        match self {
            Verdict::Convert => "convert",
            Verdict::Deny => "deny",
            Verdict::Retry => "retry",
            Verdict::Discard => "discard",
            Verdict::Stop => "stop",
            Verdict::None => "none",
        }
    }
}

/// A decision as an event holds it. What it leaves to the request is filled in, so two of them are equal if they do the
/// same. A Stop's reason is not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedDecision {
    /// The kind of the decision.
    pub verdict: Verdict,
    /// Convert: the first gpa; else 0.
    pub gpa: u64,
    /// Convert: the size in bytes; else 0.
    pub size: u64,
    /// Convert: the state to convert to; else the one that was asked for.
    pub to: State,
    /// Convert: whether KVM is to map the pages before the guest touches them.
    pub prefault: bool,
    /// Convert: whether the old side is to be discarded.
    pub discard: bool,
    /// Deny: the errno for the guest; else 0.
    pub errno: i32,
}

impl RecordedDecision {
    /// No decision, on a request for pages to become `to`.
    pub const fn none(to: State) -> Self {
        Self {
            verdict: Verdict::None,
            gpa: 0,
            size: 0,
            to,
            prefault: false,
            discard: false,
            errno: 0,
        }
    }

    /// A refusal of such a request.
    pub const fn deny(to: State, errno: Errno) -> Self {
        Self {
            verdict: Verdict::Deny,
            errno: errno.0,
            ..Self::none(to)
        }
    }

    /// A decision on a request for the pages `asked` to become `to`.
    pub fn of(decision: &Decision, asked: Range, to: State) -> Self {
        let verdict = match decision {
            Decision::Convert(convert) => return Self::convert(convert, asked, to),
            Decision::Deny(errno) => return Self::deny(to, *errno),
            Decision::Retry | Decision::Wait(_) => Verdict::Retry,
            Decision::Discard => Verdict::Discard,
            Decision::Stop(_) => Verdict::Stop,
            Decision::Remember(_) => Verdict::None,
        };
        Self {
            verdict,
            ..Self::none(to)
        }
    }

    /// The same, of a decision to convert.
    #[inline]
    pub(crate) fn convert(convert: &Convert, asked: Range, to: State) -> Self {
        Self {
            verdict: Verdict::Convert,
            gpa: convert.gpa.unwrap_or(asked.gpa()),
            size: convert.size.unwrap_or(asked.size()),
            to: convert.to.unwrap_or(to),
            prefault: convert.prefault,
            discard: !convert.keep,
            errno: 0,
        }
    }
}

/// In place of a vCPU's index, for what no vCPU did.
pub const NO_VCPU: u32 = u32::MAX;

/// Which device accessed a page that is not shared, for what, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByDevice {
    /// Its number on the PCI bus, from 1.
    pub number: u32,
    /// The index of its queue.
    pub queue: u16,
    /// The index of the request's first descriptor; `None` for the queue's rings.
    pub descriptor: Option<u16>,
    /// Whether it was to write.
    pub write: bool,
}

/// One request, from its exit until the guest resumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The event's number, from 0, in the order in which requests were completed.
    pub sequence: u64,
    /// When its exit was seen, in nanoseconds of CLOCK_MONOTONIC. A replay goes by this order.
    pub time: u64,
    /// The vCPU's index; [`NO_VCPU`] for a device's access, and for a missing page that no vCPU touched.
    pub vcpu: u32,
    /// The device's access.
    pub device: Option<ByDevice>,
    /// The kind of request.
    pub kind: Kind,
    /// What was asked for: the first gpa, without the view bit.
    pub gpa: u64,
    /// What was asked for: the size in bytes.
    pub size: u64,
    /// What was asked for: the state.
    pub to: State,
    /// The state of the pages when it came; `None` where it was mixed.
    pub state: Option<State>,
    /// Explicit: the guest's page-size hint in bytes; else 0.
    pub page_size: u32,
    /// Explicit: the attributes (RDX) as the guest gave them; else 0.
    pub raw: u32,
    /// Implicit: KVM_MEMORY_EXIT_FLAG_*; else 0.
    pub flags: u32,
    /// Implicit: the guest's instruction pointer, as [`ImplicitRequest`](crate::policy::request::ImplicitRequest) has it;
    /// else 0.
    pub rip: u64,
    /// Implicit: how often the same fault came before, with no change of the page in between; else 0.
    pub repeats: u32,
    /// What was decided.
    pub decision: RecordedDecision,
    /// How it ended.
    pub outcome: Outcome,
    /// What was converted: the first gpa.
    pub done_gpa: u64,
    /// What was converted: the size in bytes, 0 for nothing.
    pub done_size: u64,
    /// What was converted: the state that it was converted to.
    pub done_to: State,
    /// Of these, the bytes that were not in that state before.
    pub changed: u64,
    /// What the guest was answered: 0, or a positive errno.
    pub errno: i32,
    /// From the exit until the guest resumes, in nanoseconds.
    pub latency: u64,
}

/// The part of an [`Event`] that is known when the request comes. The fields are the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked {
    pub time: u64,
    pub kind: Kind,
    pub gpa: u64,
    pub size: u64,
    pub to: State,
    pub state: Option<State>,
    pub page_size: u32,
    pub raw: u32,
    pub flags: u32,
    pub rip: u64,
    pub repeats: u32,
}

/// The part of an [`Event`] that says what was converted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    pub gpa: u64,
    pub size: u64,
    pub to: State,
    pub changed: u64,
}

impl Done {
    /// Nothing was converted, for a request for the page at `gpa` to become `to`.
    pub(crate) const fn nothing(gpa: u64, to: State) -> Self {
        Self {
            gpa,
            size: 0,
            to,
            changed: 0,
        }
    }
}
