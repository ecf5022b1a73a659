//! Built-in policies that always answer alike.

use super::decision::Decision;
use super::hooks::Policy;
use super::request::{ExplicitRequest, ImplicitRequest};
use crate::errno::Errno;
use crate::error::Failure;

/// Converts whatever is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allow;

impl Policy for Allow {}

/// Refuses everything.
#[derive(Clone, Copy, Debug)]
pub struct DenyAll {
    /// What an explicit request gets in RAX.
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

/// Converts what the guest asks for explicitly, and refuses implicit requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExplicitOnly;

impl Policy for ExplicitOnly {
    fn memory_fault(&self, _: &ImplicitRequest) -> Result<Decision, Failure> {
        Ok(Decision::Deny(Errno(libc::EINVAL)))
    }
}
