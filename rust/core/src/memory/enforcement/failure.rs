//! Why KVM does not enforce what was asked, and the states that an undo goes back to.

use super::slot_table::OutOfSlots;
use crate::errno::Errno;
use crate::memory::address::{Range, Run, State};

/// KVM refused, or there are too few memslots.
pub(crate) enum Failure {
    /// Nothing was done.
    NoSlots(OutOfSlots),
    /// What had been done was undone, if `undo` says so.
    Kernel { errno: Errno, undo: Result<(), Errno> },
}

impl Failure {
    /// The failure of a later step, after the earlier ones were undone with this result.
    pub(super) fn and_undo(self, earlier: Result<(), Errno>) -> Self {
        match (self, earlier) {
            (Failure::NoSlots(_), Err(undo)) => Failure::Kernel {
                errno: Errno(libc::ENOSPC),
                undo: Err(undo),
            },
            (Failure::Kernel { errno, undo }, earlier) => Failure::Kernel {
                errno,
                undo: undo.and(earlier),
            },
            (failure, Ok(())) => failure,
        }
    }
}

/// The states of a range's pages before a conversion.
#[derive(Clone, Copy)]
pub(crate) struct Before<'a> {
    /// Of all of them, if they agree.
    pub uniform: Option<State>,
    /// Else the runs of any part of the range.
    pub runs: &'a dyn Fn(Range) -> Vec<Run>,
}

impl Before<'_> {
    /// All pages of whatever range.
    pub(super) fn all_of(state: State) -> Self {
        Self {
            uniform: Some(state),
            runs: &|_| Vec::new(),
        }
    }

    pub(super) fn runs(&self, range: Range) -> Vec<Run> {
        match self.uniform {
            Some(state) => vec![Run { range, state }],
            None => (self.runs)(range),
        }
    }

    pub(super) fn all(&self, range: Range, state: State) -> bool {
        match self.uniform {
            Some(uniform) => uniform == state,
            None => (self.runs)(range).iter().all(|run| run.state == state),
        }
    }
}
