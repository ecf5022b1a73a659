//! Ranges outside of which nothing becomes shared.

use std::sync::Arc;

use super::chain::Link;
use super::decision::Decision;
use super::hooks::Policy;
use super::request::Request;
use crate::errno::Errno;
use crate::error::Failure;
use crate::memory::address::{Range, State};

/// Refuses conversions to shared outside of these ranges: a swiotlb window, a ring. `then` decides on everything else.
pub struct Window {
    /// The ranges. All pages of a conversion to shared must be in one of them.
    pub ranges: Vec<Range>,
    /// The wrapped policy.
    pub then: Arc<dyn Policy>,
}

impl Link for Window {
    fn then(&self) -> &dyn Policy {
        self.then.as_ref()
    }

    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure> {
        let decision = self.then().judge(request)?;
        let Decision::Convert(conversion) = &decision else {
            return Ok(decision);
        };
        let (start, end, to) = request.target(conversion);
        let inside = |window: &Range| window.gpa() <= start && end <= window.end();
        Ok(match to == State::Shared && !self.ranges.iter().any(inside) {
            true => Decision::Deny(Errno(libc::EINVAL)),
            false => decision,
        })
    }
}
