//! Policies that come with the core. A chain of them alone never leaves Rust.
//!
//! Each that has a `then` asks it first or last, and changes or replaces its answer; none widens what `then` denied.

mod align;
mod ping_pong;
mod quota;
mod rate_limit;
mod window;

pub use align::Align;
pub use ping_pong::PingPong;
pub use quota::Quota;
pub use rate_limit::RateLimit;
pub use window::Window;

use crate::attributes::{Range, State};
use crate::errno::Errno;
use crate::error::Failure;
use crate::policy::{Call, Conversion, Decision, Fault, Policy};

/// Refuses everything.
#[derive(Clone, Copy, Debug)]
pub struct DenyAll {
    /// What the guest finds in RAX after an explicit request.
    pub errno: Errno,
}

impl Policy for DenyAll {
    fn memory_fault(&self, _: &Fault) -> Result<Decision, Failure> {
        Ok(Decision::Deny(self.errno))
    }

    fn map_gpa_range(&self, _: &Call) -> Result<Decision, Failure> {
        Ok(Decision::Deny(self.errno))
    }
}

/// Converts what the guest asks for in so many words, and refuses what it merely touches.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExplicitOnly;

impl Policy for ExplicitOnly {
    fn memory_fault(&self, _: &Fault) -> Result<Decision, Failure> {
        Ok(Decision::Deny(Errno(libc::EINVAL)))
    }
}

/// Either kind of request, for what treats them alike.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// By an access.
    Implicit(&'a Fault),
    /// By KVM_HC_MAP_GPA_RANGE.
    Explicit(&'a Call),
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

    /// What `conversion` would convert: start, end and state.
    pub(crate) fn target(self, conversion: &Conversion) -> (u64, u64, State) {
        let start = conversion.gpa.unwrap_or(self.range().gpa());
        let size = conversion.size.unwrap_or(self.range().size());
        (start, start.saturating_add(size), conversion.to.unwrap_or(self.to()))
    }

    pub(crate) fn ask(self, policy: &dyn Policy) -> Result<Decision, Failure> {
        match self {
            Request::Implicit(fault) => policy.memory_fault(fault),
            Request::Explicit(call) => policy.map_gpa_range(call),
        }
    }
}

/// A policy that treats both kinds of request alike and leaves poison to the next.
pub(crate) trait Link: Send + Sync {
    fn then(&self) -> &dyn Policy;
    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure>;
}

impl<T: Link> Policy for T {
    fn memory_fault(&self, fault: &Fault) -> Result<Decision, Failure> {
        self.judge(Request::Implicit(fault))
    }

    fn map_gpa_range(&self, call: &Call) -> Result<Decision, Failure> {
        self.judge(Request::Explicit(call))
    }

    fn memory_poison(&self, poison: &Fault) -> Result<Decision, Failure> {
        self.then().memory_poison(poison)
    }
}
