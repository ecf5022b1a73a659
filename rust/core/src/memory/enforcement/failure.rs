//! The failures of enforcement, and the states that an undo restores.

use super::slot_table::OutOfSlots;
use crate::errno::Errno;
use crate::memory::address::{Range, Run, State};

/// Why KVM does not enforce a state.
pub(crate) enum NotEnforced {
    /// There are too few memslots. Nothing was done.
    NoSlots(OutOfSlots),
    /// A system call failed with `errno`. What had been done before was undone, or undoing it failed, too.
    Kernel { errno: Errno, undo: Result<(), Errno> },
}

impl NotEnforced {
    /// This failure of a later step, after the earlier steps were undone with result `earlier`.
    pub(super) fn with_undo(self, earlier: Result<(), Errno>) -> Self {
        match (self, earlier) {
            (NotEnforced::NoSlots(_), Err(undo)) => NotEnforced::Kernel {
                errno: Errno(libc::ENOSPC),
                undo: Err(undo),
            },
            (NotEnforced::Kernel { errno, undo }, earlier) => NotEnforced::Kernel {
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
    /// The state of all of them; `None` where it is mixed.
    pub uniform: Option<State>,
    /// Where it is mixed: gives the runs of any part of the range.
    pub runs: &'a dyn Fn(Range) -> Vec<Run>,
}

impl Before<'_> {
    /// All pages are in `state`.
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

    /// Whether all pages of a part of the range are in `state`.
    pub(super) fn all(&self, range: Range, state: State) -> bool {
        match self.uniform {
            Some(uniform) => uniform == state,
            None => (self.runs)(range).iter().all(|run| run.state == state),
        }
    }
}
