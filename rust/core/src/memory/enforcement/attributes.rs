//! KVM_SET_MEMORY_ATTRIBUTES for a range, in calls of at most a block, and its undo.

use std::sync::Arc;

use super::failure::{Before, NotEnforced};
use crate::errno::Errno;
use crate::hypervisor::vm::Hypervisor;
use crate::memory::address::{Range, Run, State};
use crate::memory::views::Views;

/// One view's attributes: which of its pages carry PRIVATE.
#[derive(Clone, Copy)]
pub(super) struct ViewAttributes {
    /// The view.
    pub view: State,
    /// The state of the pages that carry PRIVATE there.
    pub private_in: State,
}

pub(super) struct Attributes {
    pub hypervisor: Arc<dyn Hypervisor>,
    pub views: Views,
}

impl Attributes {
    /// Gives `range` in one view the attributes of pages in state `to`. What was done before a failure is undone.
    #[inline(always)]
    pub(super) fn set(
        &self,
        at: ViewAttributes,
        range: Range,
        to: State,
        before: Before<'_>,
    ) -> Result<(), NotEnforced> {
        // Most ranges are one page, which takes one call.
        if range.in_one_block() && before.uniform == Some(to.other()) {
            return self
                .call(at, range, to)
                .map_err(|errno| self.failed(at, range, errno, before));
        }
        self.set_by_blocks(at, range, to, before)
    }

    #[inline(never)]
    fn set_by_blocks(
        &self,
        at: ViewAttributes,
        range: Range,
        to: State,
        before: Before<'_>,
    ) -> Result<(), NotEnforced> {
        for part in range.blocks() {
            if before.all(part, to) {
                continue;
            }
            if let Err(errno) = self.call(at, part, to) {
                let tried = Range::new(range.gpa(), part.end() - range.gpa()).unwrap_or(range);
                return Err(self.failed(at, tried, errno, before));
            }
        }
        Ok(())
    }

    #[inline]
    pub(super) fn call(&self, at: ViewAttributes, range: Range, to: State) -> Result<(), Errno> {
        let gpa = self.views.address(range.gpa(), at.view);
        self.hypervisor
            .set_memory_attributes(gpa, range.size(), to == at.private_in)
    }

    /// Undoes the calls for `tried`. The last of them failed, and may have done a part of its work.
    #[cold]
    fn failed(&self, at: ViewAttributes, tried: Range, errno: Errno, before: Before<'_>) -> NotEnforced {
        let undo = self.restore(at, tried, before);
        NotEnforced::Kernel { errno, undo }
    }

    /// Gives `range` the attributes of the states from before.
    pub(super) fn restore(&self, at: ViewAttributes, range: Range, before: Before<'_>) -> Result<(), Errno> {
        for part in range.blocks() {
            for Run { range, state } in before.runs(part) {
                self.call(at, range, state)?;
            }
        }
        Ok(())
    }
}
