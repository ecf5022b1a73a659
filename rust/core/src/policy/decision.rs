//! Decisions: what a policy can answer.

use std::time::Duration;

use crate::errno::Errno;
use crate::memory::address::{Range, State};

/// A decision to convert. What is `None` is as the request asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Convert {
    /// The state to convert to.
    pub to: Option<State>,
    /// The start of the range, page-aligned.
    pub gpa: Option<u64>,
    /// The size of the range in bytes, page-aligned.
    pub size: Option<u64>,
    /// Have KVM map the pages before the guest touches them (KVM_PRE_FAULT_MEMORY), where the host has it.
    pub prefault: bool,
    /// Do not discard the old side: its bytes are there again after the conversion back, and until then the page takes
    /// memory on both sides.
    pub keep: bool,
    /// Refuse if more bytes than this would be shared after it.
    pub max_shared: Option<u64>,
    /// Widen the range to whole blocks of this many bytes, a power of two: as far as memory and `within` go, and only
    /// if `max_shared` and the listeners allow it. Else the range itself is converted.
    pub widen: Option<u64>,
    /// The pages that the range must stay in when it is widened. They hold the range.
    pub within: Option<Range>,
}

/// What is to be done about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Convert: as asked, or other pages, or to the other state.
    Convert(Convert),
    /// Refuse. Explicit: the guest gets the errno in RAX, as a positive number. Implicit: the run ends as "denied".
    Deny(Errno),
    /// Let the guest try again. Explicit: it gets EAGAIN.
    Retry,
    /// Let the guest try again, but not before this time has passed. Explicit: as Retry.
    Wait(Duration),
    /// Free the poisoned page and resume the guest, which reads zeroes there. Only for poison.
    Discard,
    /// End the run with this reason.
    Stop(String),
    /// A decision, and the region in which it holds for later requests, too. Only for a policy inside of a
    /// [`Remember`](super::remember::Remember), which takes it out; elsewhere it is an error.
    Remember(Box<RegionDecision>),
}

/// Where, how often and for how long a decision holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// The pages. A request is answered if all of its pages are among them.
    pub range: Range,
    /// How many later requests it answers; `None`: any number.
    pub uses: Option<u64>,
    /// For how many nanoseconds after the request that it was made for, by the requests' times; `None`: without a
    /// limit.
    pub nanoseconds: Option<u64>,
}

/// A decision, and the region in which it answers later requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionDecision {
    /// The decision.
    pub decision: Decision,
    /// Where it holds.
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
            widen: None,
            within: None,
        })
    }
}
