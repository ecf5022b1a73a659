//! How much work a search does at most, whatever the file has.

use super::super::pace::{Pace, no_memory};
use crate::allocation::push;
use crate::error::Error;

/// A tenth of a second's. Distributions' kernels need at most 4 percent of it.
const MOST: u32 = 20_000_000;

/// The steps that are left, and why there are none any more, if that is an error.
pub(super) struct Steps<'a, 'b, 'w> {
    pub(super) pace: &'a mut Pace<'b, 'w>,
    left: u32,
    error: Option<Error>,
}

impl<'a, 'b, 'w> Steps<'a, 'b, 'w> {
    pub(super) fn new(pace: &'a mut Pace<'b, 'w>) -> Self {
        Self {
            pace,
            left: MOST,
            error: None,
        }
    }

    /// `None` if the steps are used up, or the watch failed.
    pub(super) fn take(&mut self) -> Option<()> {
        self.left = self.left.checked_sub(1)?;
        match self.pace.spend(1) {
            Ok(()) => Some(()),
            Err(error) => self.fail(error),
        }
    }

    /// Adds one to a list; `None` if there is no memory.
    pub(super) fn push<T>(&mut self, list: &mut Vec<T>, value: T) -> Option<()> {
        match push(list, value) {
            Ok(()) => Some(()),
            Err(errno) => self.fail(no_memory(errno)),
        }
    }

    /// What a search found, unless it ended with an error.
    pub(super) fn checked<T>(&mut self, found: T) -> Result<T, Error> {
        self.error.take().map_or(Ok(found), Err)
    }

    fn fail(&mut self, error: Error) -> Option<()> {
        self.error = Some(error);
        self.left = 0;
        None
    }
}
