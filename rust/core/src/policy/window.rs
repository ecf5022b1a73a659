//! Ranges outside of which nothing becomes shared.

use std::sync::Arc;

use super::chain::Link;
use super::decision::{Convert, Decision};
use super::hooks::Policy;
use super::request::Request;
use crate::errno::Errno;
use crate::error::Failure;
use crate::memory::address::{Range, State};

/// Refuses conversions to shared outside of these ranges: a swiotlb window, a ring. `then` decides on everything else.
/// Nor is a conversion to shared widened past the range that it lies in.
pub struct Window {
    /// The ranges. All pages of a conversion to shared must be in one of them; where several hold them, the first counts.
    pub ranges: Vec<Range>,
    /// The wrapped policy.
    pub then: Arc<dyn Policy>,
}

impl Link for Window {
    fn then(&self) -> &dyn Policy {
        self.then.as_ref()
    }

    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure> {
        let conversion = match self.then().judge(request)? {
            Decision::Convert(conversion) => conversion,
            decision => return Ok(decision),
        };
        let (range, to) = request.target(&conversion)?;
        if to == State::Private {
            return Ok(Decision::Convert(conversion));
        }
        let holds = |window: &&Range| window.intersect(&range) == Some(range);
        let Some(window) = self.ranges.iter().find(holds) else {
            return Ok(Decision::Deny(Errno(libc::EINVAL)));
        };
        // Both hold the range, so they overlap.
        let within = conversion.within.unwrap_or(*window).intersect(window);
        Ok(Decision::Convert(Convert { within, ..conversion }))
    }
}
