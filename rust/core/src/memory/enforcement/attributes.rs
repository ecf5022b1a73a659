//! KVM_SET_MEMORY_ATTRIBUTES for a range, in calls of at most a block, and its undo.

use std::sync::Arc;

use super::failure::{Before, NotEnforced};
use crate::errno::Errno;
use crate::hypervisor::vm::Hypervisor;
use crate::memory::address::{Range, State};

pub(super) struct Attributes(pub Arc<dyn Hypervisor>);

impl Attributes {
    /// Sets the attribute of all of `range`. What was done before a failure is undone.
    #[inline]
    pub(super) fn set(&self, range: Range, to: State, before: Before<'_>) -> Result<(), NotEnforced> {
        // Most ranges are one page, which takes one call.
        if range.in_one_block() && before.uniform == Some(to.other()) {
            return self.call(range, to).map_err(|errno| self.failed(range, errno, before));
        }
        self.set_by_blocks(range, to, before)
    }

    fn set_by_blocks(&self, range: Range, to: State, before: Before<'_>) -> Result<(), NotEnforced> {
        for part in range.blocks() {
            if before.all(part, to) {
                continue;
            }
            if let Err(errno) = self.call(part, to) {
                let tried = Range::new(range.gpa(), part.end() - range.gpa()).unwrap_or(range);
                return Err(self.failed(tried, errno, before));
            }
        }
        Ok(())
    }

    #[inline]
    fn call(&self, range: Range, to: State) -> Result<(), Errno> {
        self.0
            .set_memory_attributes(range.gpa(), range.size(), to == State::Private)
    }

    /// Undoes the calls for `tried`. The last of them failed, and may have done a part of its work.
    #[cold]
    fn failed(&self, tried: Range, errno: Errno, before: Before<'_>) -> NotEnforced {
        let undo = self.restore(tried, before);
        NotEnforced::Kernel { errno, undo }
    }

    /// Sets the attributes of `range` to the states from before.
    pub(super) fn restore(&self, range: Range, before: Before<'_>) -> Result<(), Errno> {
        for part in range.blocks() {
            for run in before.runs(part) {
                self.call(run.range, run.state)?;
            }
        }
        Ok(())
    }
}
