//! Conversions of whole blocks.

use std::sync::Arc;

use super::chain::Link;
use super::decision::{Convert, Decision};
use super::hooks::Policy;
use super::request::Request;
use crate::error::Failure;
use crate::memory::address::PAGE_SIZE;

/// Widens what `then` converts to whole blocks of `size` bytes, but not past the end of memory: one exit for a block in
/// place of one for each page.
pub struct Align {
    size: u64,
    then: Arc<dyn Policy>,
}

impl Align {
    /// `size` is a multiple of 4096 and a power of two; else `None`.
    pub fn new(size: u64, then: Arc<dyn Policy>) -> Option<Self> {
        let valid = size.is_power_of_two() && size >= PAGE_SIZE;
        valid.then_some(Self { size, then })
    }
}

impl Link for Align {
    fn then(&self) -> &dyn Policy {
        self.then.as_ref()
    }

    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure> {
        let decision = self.then().judge(request)?;
        let Decision::Convert(conversion) = decision else {
            return Ok(decision);
        };
        let (start, end, _) = request.target(&conversion);
        let wide = start - start % self.size;
        let wide_end = end.checked_next_multiple_of(self.size).unwrap_or(end);
        // A range that ends outside of memory is left as it is, to be reported as an error of `then`.
        let wide_end = if end <= request.memory() {
            wide_end.min(request.memory())
        } else {
            end
        };
        Ok(Decision::Convert(Convert {
            gpa: Some(wide),
            size: Some(wide_end - wide),
            ..conversion
        }))
    }
}
