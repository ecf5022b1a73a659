//! What a policy can decide.

use std::time::Duration;

use crate::errno::Errno;
use crate::memory::address::{Range, State};

/// A decision to convert, where it differs from what was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Convert {
    /// The state to convert to.
    pub to: Option<State>,
    /// The start of the range, page-aligned.
    pub gpa: Option<u64>,
    /// The size of the range in bytes, page-aligned.
    pub size: Option<u64>,
    /// Have KVM map the pages before the guest touches them (KVM_PRE_FAULT_MEMORY), where the host can.
    pub prefault: bool,
    /// Do not discard the old side: its bytes come back when the page does, and until then memory is held twice.
    pub keep: bool,
    /// Refuse if more bytes than this would be shared then.
    pub max_shared: Option<u64>,
}

/// What to do about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Convert: as asked, or other pages, or to the other state.
    Convert(Convert),
    /// Refuse. Explicit: the guest gets the errno in RAX. Implicit: the run ends as "denied".
    Deny(Errno),
    /// Let the guest try again. Explicit: it gets EAGAIN.
    Retry,
    /// Let the guest try again, but not before this time has passed. Explicit: as Retry.
    Wait(Duration),
    /// Free the poisoned page, and let the guest go on: it reads zeroes. An answer to poison only.
    Discard,
    /// End the run with this reason.
    Stop(String),
    /// A decision, and where else it holds. Only a [`Remember`](super::remember::Remember) around the policy understands it;
    /// elsewhere it is no answer.
    Remember(Box<Lesson>),
}

/// Where, how often and for how long a decision holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// The pages. A request is answered if all of it lies in them.
    pub range: Range,
    /// How many requests it answers.
    pub uses: Option<u64>,
    /// For how many nanoseconds, by the times of the requests.
    pub nanoseconds: Option<u64>,
}

/// A decision, and where it holds beyond the request that it was made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lesson {
    /// The decision.
    pub decision: Decision,
    /// Where it is to be remembered.
    pub region: Region,
}

impl Decision {
    /// Convert as asked.
    pub const fn as_asked() -> Self {
        Decision::Convert(Convert {
            to: None,
            gpa: None,
            size: None,
            prefault: false,
            keep: false,
            max_shared: None,
        })
    }
}
