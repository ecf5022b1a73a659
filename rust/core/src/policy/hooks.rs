//! The trait that every policy implements.

use super::decision::Decision;
use super::request::{ExplicitRequest, ImplicitRequest, Request};
use crate::error::Failure;

/// Judges requests. Called on vCPU threads, several at once.
///
/// The defaults convert as asked, and end the run at a poisoned page.
pub trait Policy: Send + Sync {
    /// Judges an implicit request.
    ///
    /// # Errors
    /// A failure ends the run; nothing is converted.
    fn memory_fault(&self, fault: &ImplicitRequest) -> Result<Decision, Failure> {
        let _ = fault;
        Ok(Decision::as_asked())
    }

    /// Judges an explicit request.
    ///
    /// # Errors
    /// As above.
    fn map_gpa_range(&self, call: &ExplicitRequest) -> Result<Decision, Failure> {
        let _ = call;
        Ok(Decision::as_asked())
    }

    /// Judges an access to a poisoned page (EHWPOISON).
    ///
    /// # Errors
    /// As above.
    fn memory_poison(&self, poison: &ImplicitRequest) -> Result<Decision, Failure> {
        let _ = poison;
        Ok(Decision::Stop("poison".to_owned()))
    }
}

impl dyn Policy + '_ {
    /// Calls the method for this kind of request.
    pub(crate) fn judge(&self, request: Request<'_>) -> Result<Decision, Failure> {
        match request {
            Request::Implicit(fault) => self.memory_fault(fault),
            Request::Explicit(call) => self.map_gpa_range(call),
        }
    }
}
