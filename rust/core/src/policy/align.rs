//! Conversions of whole blocks.

use std::sync::Arc;

use super::chain::Link;
use super::decision::{Convert, Decision};
use super::hooks::Policy;
use super::request::Request;
use crate::error::Failure;
use crate::memory::address::PAGE_SIZE;

/// Widens what `then` converts to whole blocks of `size` bytes: one exit for a block in place of one for each page.
///
/// It only asks for that. When the whole chain has decided, the range is widened as far as memory and the windows in the
/// chain go, in whatever order the policies are chained; and not at all if a quota or a listener does not allow it.
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
        Ok(match self.then().judge(request)? {
            Decision::Convert(conversion) => Decision::Convert(Convert {
                widen: conversion.widen.max(Some(self.size)),
                ..conversion
            }),
            decision => decision,
        })
    }
}
