//! A limit on the number of shared bytes.

use std::sync::Arc;

use super::chain::Link;
use super::decision::{Convert, Decision};
use super::hooks::Policy;
use super::request::Request;
use crate::error::Failure;

/// Refuses conversions after which more than `max_shared` bytes would be shared. That is checked in the conversion
/// itself, which reserves the bytes: two vCPUs together cannot exceed it.
pub struct Quota {
    /// The most bytes that may be shared.
    pub max_shared: u64,
    /// The wrapped policy.
    pub then: Arc<dyn Policy>,
}

impl Link for Quota {
    fn then(&self) -> &dyn Policy {
        self.then.as_ref()
    }

    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure> {
        Ok(match self.then().judge(request)? {
            Decision::Convert(conversion) => Decision::Convert(Convert {
                max_shared: Some(
                    conversion
                        .max_shared
                        .map_or(self.max_shared, |max| max.min(self.max_shared)),
                ),
                ..conversion
            }),
            decision => decision,
        })
    }
}
