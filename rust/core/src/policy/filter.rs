//! Which requests a policy wants to be asked about: a hook that is written in another language costs time.

use super::request::Request;
use crate::memory::address::{Range, State};

/// Conditions that a request must all meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The state that is asked for.
    pub to: Option<State>,
    /// Some of its pages lie in one of these; empty for any.
    pub pages: Vec<Range>,
    /// Its size in bytes, at least.
    pub least: u64,
    /// Its size in bytes, at most.
    pub most: Option<u64>,
    /// It is of one of these vCPUs; empty for any.
    pub vcpus: Vec<u32>,
}

impl Filter {
    /// Whether a request meets the conditions. Not inlined: hooks without conditions, as most are, would pay for it.
    #[inline(never)]
    pub fn wants(&self, request: Request<'_>) -> bool {
        let range = request.range();
        self.to.is_none_or(|to| to == request.to())
            && (self.pages.is_empty() || self.pages.iter().any(|pages| pages.overlaps(&range)))
            && range.size() >= self.least
            && self.most.is_none_or(|most| range.size() <= most)
            && (self.vcpus.is_empty() || self.vcpus.contains(&request.vcpu()))
    }
}
