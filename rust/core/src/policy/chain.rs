//! Policies around another one.

use super::decision::Decision;
use super::hooks::Policy;
use super::request::{ExplicitRequest, ImplicitRequest, Request};
use crate::error::Failure;

/// A policy that treats both kinds of request alike and leaves poison to the next.
pub(crate) trait Link: Send + Sync {
    /// The next policy.
    fn then(&self) -> &dyn Policy;
    /// Asks the next one first or last, and changes or replaces its answer; what it denied is not widened.
    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure>;
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
}
