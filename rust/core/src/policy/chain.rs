//! What the policies that wrap another one have in common.

use super::decision::Decision;
use super::device_access::DeviceAccess;
use super::hooks::Policy;
use super::knowledge::Knowledge;
use super::request::{ExplicitRequest, ImplicitRequest, Request};
use crate::error::Failure;
use crate::memory::address::{Range, State};

/// A policy that wraps another one, treats both kinds of request alike, and leaves poison and
/// devices to the other.
pub(crate) trait Link: Send + Sync {
    /// The wrapped policy.
    fn then(&self) -> &dyn Policy;
    /// Decides by itself, or asks the wrapped policy and changes its decision. Its Deny is never turned into a Convert.
    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure>;
    /// As [`Policy::converted`], for this policy alone.
    fn note_converted(&self, request: Request<'_>, range: Range, to: State) {
        let _ = (request, range, to);
    }
    /// What this policy alone knows.
    fn knowledge(&self, now: u64) -> Option<Knowledge> {
        let _ = now;
        None
    }
    /// From now on it knows this, or nothing. As it was read from a file: it may be anything.
    fn learn(&self, now: u64, knowledge: Option<&Knowledge>) {
        let _ = (now, knowledge);
    }
}

impl<T: Link> Policy for T {
    fn memory_fault(&self, fault: &ImplicitRequest) -> Result<Decision, Failure> {
        self.judge(Request::Implicit(fault))
    }

    fn map_gpa_range(&self, call: &ExplicitRequest) -> Result<Decision, Failure> {
        self.judge(Request::Explicit(call))
    }

    fn memory_poison(&self, poison: &ImplicitRequest) -> Result<Decision, Failure> {
        self.then().memory_poison(poison)
    }

    fn device_access(&self, access: &DeviceAccess) -> Result<Decision, Failure> {
        self.then().device_access(access)
    }

    fn converted(&self, request: Request<'_>, range: Range, to: State) {
        self.note_converted(request, range, to);
        self.then().converted(request, range, to);
    }

    fn tell(&self, now: u64, known: &mut Vec<Option<Knowledge>>) {
        known.push(self.knowledge(now));
        self.then().tell(now, known);
    }

    fn recall(&self, now: u64, known: &[Option<Knowledge>]) {
        self.learn(now, known.first().and_then(Option::as_ref));
        self.then().recall(now, known.get(1..).unwrap_or_default());
    }
}
