//! Built-in policies whose decision does not depend on the request.

use super::decision::Decision;
use super::hooks::Policy;
use super::request::{ExplicitRequest, ImplicitRequest};
use crate::errno::Errno;
use crate::error::Failure;

/// Converts as asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allow;

impl Policy for Allow {}

/// Refuses every request.
#[derive(Clone, Copy, Debug)]
pub struct DenyAll {
    /// The errno that an explicit request gets in RAX, as a positive number.
    pub errno: Errno,
}

impl Policy for DenyAll {
    fn memory_fault(&self, _: &ImplicitRequest) -> Result<Decision, Failure> {
        Ok(Decision::Deny(self.errno))
    }

    fn map_gpa_range(&self, _: &ExplicitRequest) -> Result<Decision, Failure> {
        Ok(Decision::Deny(self.errno))
    }
}

/// Converts explicit requests as asked, and refuses implicit ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExplicitOnly;

impl Policy for ExplicitOnly {
    fn memory_fault(&self, _: &ImplicitRequest) -> Result<Decision, Failure> {
        Ok(Decision::Deny(Errno(libc::EINVAL)))
    }
}
