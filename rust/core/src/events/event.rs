//! One request, from exit to resume: what was asked, decided and done.

use crate::errno::Errno;
use crate::memory::address::{Range, State};
use crate::policy::decision::{Convert, Decision};

/// How a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By an access.
    Implicit,
    /// By KVM_HC_MAP_GPA_RANGE.
    Explicit,
    /// An access to a poisoned page.
    Poison,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Implicit, Kind::Explicit, Kind::Poison];

    /// The field's word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Implicit => "implicit",
            Kind::Explicit => "explicit",
            Kind::Poison => "poison",
        }
    }
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Converted, as asked or as the policy had it.
    Converted,
    /// Refused by the policy.
    Denied,
    /// To be tried again.
    Retried,
    /// The policy ended the run.
    Stopped,
    /// Another vCPU was faster; the guest looks again.
    Superseded,
    /// Decided to convert, but that failed; or no decision could be had.
    Failed,
    /// The poisoned page was freed.
    Discarded,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Outcome; 7] = [
        Outcome::Converted,
        Outcome::Denied,
        Outcome::Retried,
        Outcome::Stopped,
        Outcome::Superseded,
        Outcome::Failed,
        Outcome::Discarded,
    ];

    /// One word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Converted => "converted",
            Outcome::Denied => "denied",
            Outcome::Retried => "retried",
            Outcome::Stopped => "stopped",
            Outcome::Superseded => "superseded",
            Outcome::Failed => "failed",
            Outcome::Discarded => "discarded",
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
    /// Retry, at once or after a while.
    Retry,
    /// Discard the poisoned page.
    Discard,
    /// End the run.
    Stop,
    /// There was no decision: the hook failed.
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

    /// One word.
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

/// A decision as events hold it, with what it leaves to the request filled in: two of them are equal if they would do the
/// same. A Stop's reason is not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedDecision {
    /// Which decision.
    pub verdict: Verdict,
    /// What is to be converted: start. 0 for all but Convert.
    pub gpa: u64,
    /// What is to be converted: bytes. 0 for all but Convert.
    pub size: u64,
    /// What it is to be converted to; else what was asked for.
    pub to: State,
    /// Convert: map the pages at once.
    pub prefault: bool,
    /// Convert: discard the old side.
    pub discard: bool,
    /// Deny: what the guest is told. 0 for all but Deny.
    pub errno: i32,
}

impl RecordedDecision {
    /// No decision on a request for pages to become `to`.
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

    /// A refusal of the same.
    pub const fn deny(to: State, errno: Errno) -> Self {
        Self {
            verdict: Verdict::Deny,
            errno: errno.0,
            ..Self::none(to)
        }
    }

    /// What a decision on such a request says.
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

    /// What a decision to convert says.
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

/// One request, from exit to resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Position in the log, from 0: in the order in which requests were over.
    pub sequence: u64,
    /// When it came: nanoseconds of CLOCK_MONOTONIC. The order in which policies were asked.
    pub time: u64,
    /// The vCPU's index.
    pub vcpu: u32,
    /// How it came.
    pub kind: Kind,
    /// What was asked for: start, without the shared bit.
    pub gpa: u64,
    /// What was asked for: bytes.
    pub size: u64,
    /// What was asked for: the state.
    pub to: State,
    /// The state that the pages were in; `None` where it was mixed.
    pub state: Option<State>,
    /// Explicit: the guest's page-size hint in bytes; else 0.
    pub page_size: u32,
    /// Explicit: the attribute word as the guest gave it; else 0.
    pub raw: u32,
    /// Implicit: KVM_MEMORY_EXIT_FLAG_*; else 0.
    pub flags: u32,
    /// Implicit: the guest's instruction pointer; else 0.
    pub rip: u64,
    /// Implicit: how often this very fault came before, with no change in between; else 0.
    pub repeats: u32,
    /// What was decided.
    pub decision: RecordedDecision,
    /// What came of it.
    pub outcome: Outcome,
    /// What was converted: start.
    pub done_gpa: u64,
    /// What was converted: bytes, 0 for none.
    pub done_size: u64,
    /// What it was converted to.
    pub done_to: State,
    /// Bytes whose state really changed.
    pub changed: u64,
    /// What the guest was told: 0, or a positive errno.
    pub errno: i32,
    /// Exit to resume, in nanoseconds.
    pub latency: u64,
}

/// What a request is about, which is known when it comes. The fields are [`Event`]'s.
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

/// What was converted for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    pub gpa: u64,
    pub size: u64,
    pub to: State,
    pub changed: u64,
}

impl Done {
    /// Nothing of these pages.
    pub(crate) const fn nothing(gpa: u64, to: State) -> Self {
        Self {
            gpa,
            size: 0,
            to,
            changed: 0,
        }
    }
}
