//! Requests, as a policy gets them.

use super::decision::Convert;
use crate::errno::Errno;
use crate::memory::address::{Range, State};

/// An implicit request: an access to a page in the wrong state. Also what a policy gets
/// for an access to a poisoned page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImplicitRequest {
    /// The vCPU's index.
    pub vcpu: u32,
    /// The page or pages, without the shared bit.
    pub range: Range,
    /// The state that the access needs.
    pub access: State,
    /// KVM_MEMORY_EXIT_FLAG_* as KVM reported them; under memslots, where it reports none, as it would have.
    pub flags: u64,
    /// KVM_RUN's errno: EFAULT, or EHWPOISON for poison.
    pub errno: Errno,
    /// The page's state.
    pub state: State,
    /// The guest's instruction pointer.
    pub rip: u64,
    /// How often the same fault came before, with no change of the page in between.
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
    /// The pages, without the shared bit.
    pub range: Range,
    /// The state that they are to become.
    pub to: State,
    /// The guest's page-size hint in bytes.
    pub page_size: u64,
    /// The attributes (RDX) as the guest gave them.
    pub raw: u64,
    /// The state of the pages; `None` where it is mixed.
    pub state: Option<State>,
    /// When it came: nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Bytes of guest memory.
    pub memory: u64,
}

/// Either kind of request, for policies that treat them alike.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// The guest touched a page in the wrong state.
    Implicit(&'a ImplicitRequest),
    /// The guest asked, by KVM_HC_MAP_GPA_RANGE.
    Explicit(&'a ExplicitRequest),
}

impl Request<'_> {
    /// The pages that were asked for.
    pub fn range(self) -> Range {
        match self {
            Request::Implicit(fault) => fault.range,
            Request::Explicit(call) => call.range,
        }
    }

    /// The state that they are to become.
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

    /// When it came, in nanoseconds. A policy that measures time uses this one, so that it decides the same when a
    /// trace is replayed.
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

    /// What a decision converts for this request: first address, end, and state. The end saturates; a range that wraps
    /// is an error later.
    pub(crate) fn target(self, convert: &Convert) -> (u64, u64, State) {
        let start = convert.gpa.unwrap_or(self.range().gpa());
        let size = convert.size.unwrap_or(self.range().size());
        (start, start.saturating_add(size), convert.to.unwrap_or(self.to()))
    }
}
