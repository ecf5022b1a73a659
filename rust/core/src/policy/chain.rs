//! What the policies that wrap another one have in common.

use super::decision::Decision;
use super::hooks::Policy;
use super::request::{ExplicitRequest, ImplicitRequest, Request};
use crate::error::Failure;

/// A policy that wraps another one, treats both kinds of request alike, and leaves poison to the other.
pub(crate) trait Link: Send + Sync {
    /// The wrapped policy.
    fn then(&self) -> &dyn Policy;
    /// Decides by itself, or asks the wrapped policy and changes its decision. Its Deny is never turned into a Convert.
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
