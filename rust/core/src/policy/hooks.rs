//! The trait that every policy implements.

use super::decision::Decision;
use super::device_access::DeviceAccess;
use super::knowledge::Knowledge;
use super::request::{ExplicitRequest, ImplicitRequest, Request};
use crate::errno::Errno;
use crate::error::Failure;
use crate::memory::address::{Range, State};

/// Judges requests. Called on vCPU threads, several at once.
///
/// The defaults convert as asked, end the run at a poisoned page, and refuse devices what is private.
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

    /// Judges a device's access to a private page, which is not carried out in any case. Called on the device's thread.
    /// Deny fails the device's request; Stop ends the run, too.
    ///
    /// # Errors
    /// As above.
    fn device_access(&self, access: &DeviceAccess) -> Result<Decision, Failure> {
        let _ = access;
        Ok(Decision::Deny(Errno(libc::EACCES)))
    }

    /// Whether it judges such a request itself. One that it does not is left to the default: no decision that it made about
    /// others and that is remembered answers it.
    fn wants(&self, request: Request<'_>) -> bool {
        let _ = request;
        true
    }

    /// Is told what was converted for a request, where that is not what was asked for: widened, other pages, the other
    /// state. No hook of Python's.
    fn converted(&self, request: Request<'_>, range: Range, to: State) {
        let _ = (request, range, to);
    }

    /// Adds what it knows at the time `now`, in nanoseconds, and what the policies know that it asks: one entry for each that
    /// asks another.
    fn tell(&self, now: u64, known: &mut Vec<Option<Knowledge>>) {
        let _ = (now, known);
    }

    /// From now on it knows what [`tell`](Self::tell) has said, as do those that it asks, and nothing else. What is not its
    /// own it does not take, so that it knows nothing.
    fn recall(&self, now: u64, known: &[Option<Knowledge>]) {
        let _ = (now, known);
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
