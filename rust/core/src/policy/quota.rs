//! A limit on what is exposed.

use std::sync::Arc;

use super::chain::Link;
use super::decision::{Convert, Decision};
use super::hooks::Policy;
use super::request::Request;
use crate::error::Failure;

/// Refuses conversions after which more than `max_shared` bytes would be shared. The gate counts, with the pages
/// locked: no two vCPUs slip through together.
pub struct Quota {
    /// Bytes of memory that may be shared at most.
    pub max_shared: u64,
    /// Who is asked first.
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
