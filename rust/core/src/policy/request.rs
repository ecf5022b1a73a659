//! What a policy is told of a request.

use super::decision::Convert;
use crate::errno::Errno;
use crate::memory::address::{Range, State};

/// An implicit request: an access met a page that is not in the accessed state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImplicitRequest {
    /// The vCPU's index.
    pub vcpu: u32,
    /// The page or pages, shared bit stripped.
    pub range: Range,
    /// The side that was accessed.
    pub access: State,
    /// KVM_MEMORY_EXIT_FLAG_* as KVM reported them, or as it would have.
    pub flags: u64,
    /// EFAULT; for poison EHWPOISON.
    pub errno: Errno,
    /// The page's state.
    pub state: State,
    /// The guest's instruction pointer.
    pub rip: u64,
    /// How often this very fault came before, with no change of the page in between.
    pub repeats: u32,
    /// When it came: nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Bytes of guest memory.
    pub memory: u64,
}

/// An explicit request: KVM_HC_MAP_GPA_RANGE, well-formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExplicitRequest {
    /// The vCPU's index.
    pub vcpu: u32,
    /// The pages, shared bit stripped.
    pub range: Range,
    /// What the guest wants them to be.
    pub to: State,
    /// The guest's page-size hint in bytes.
    pub page_size: u64,
    /// The attribute word as the guest gave it.
    pub raw: u64,
    /// The present state; `None` where it is mixed.
    pub state: Option<State>,
    /// When it came: nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Bytes of guest memory.
    pub memory: u64,
}

/// Either kind of request, for what treats them alike.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// By an access.
    Implicit(&'a ImplicitRequest),
    /// By KVM_HC_MAP_GPA_RANGE.
    Explicit(&'a ExplicitRequest),
}

impl Request<'_> {
    /// What was asked for.
    pub fn range(self) -> Range {
        match self {
            Request::Implicit(fault) => fault.range,
            Request::Explicit(call) => call.range,
        }
    }

    /// What the pages are to become.
    pub fn to(self) -> State {
        match self {
            Request::Implicit(fault) => fault.access,
            Request::Explicit(call) => call.to,
        }
    }

    pub(crate) fn memory(self) -> u64 {
        match self {
            Request::Implicit(fault) => fault.memory,
            Request::Explicit(call) => call.memory,
        }
    }

    /// Nanoseconds, on the machine's clock: a policy that measures time gives the same answers when a trace is replayed.
    pub(crate) fn time(self) -> u64 {
        match self {
            Request::Implicit(fault) => fault.time,
            Request::Explicit(call) => call.time,
        }
    }

    pub(crate) fn vcpu(self) -> u32 {
        match self {
            Request::Implicit(fault) => fault.vcpu,
            Request::Explicit(call) => call.vcpu,
        }
    }

    /// What a decision to convert means for this request: start, end and state. The end saturates; a range that wraps is
    /// refused later.
    pub(crate) fn target(self, convert: &Convert) -> (u64, u64, State) {
        let start = convert.gpa.unwrap_or(self.range().gpa());
        let size = convert.size.unwrap_or(self.range().size());
        (start, start.saturating_add(size), convert.to.unwrap_or(self.to()))
    }
}
