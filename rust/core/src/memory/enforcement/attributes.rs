//! KVM_SET_MEMORY_ATTRIBUTES over a range, in calls of a bounded size, and back.

use std::sync::Arc;

use super::failure::{Before, Failure};
use crate::errno::Errno;
use crate::hypervisor::vm::Hypervisor;
use crate::memory::address::{Range, State};

pub(super) struct Attributes(pub Arc<dyn Hypervisor>);

impl Attributes {
    /// Sets all of `range`. What was done before a failure is undone.
    #[inline]
    pub(super) fn set(&self, range: Range, to: State, before: Before<'_>) -> Result<(), Failure> {
        // Most ranges are one page, which needs one call.
        if range.in_one_chunk() && before.uniform == Some(to.other()) {
            return self.call(range, to).map_err(|errno| self.failed(range, errno, before));
        }
        self.set_in_chunks(range, to, before)
    }

    fn set_in_chunks(&self, range: Range, to: State, before: Before<'_>) -> Result<(), Failure> {
        for chunk in range.chunks() {
            if before.all(chunk, to) {
                continue;
            }
            if let Err(errno) = self.call(chunk, to) {
                let done = Range::new(range.gpa(), chunk.end() - range.gpa()).unwrap_or(range);
                return Err(self.failed(done, errno, before));
            }
        }
        Ok(())
    }

    #[inline]
    fn call(&self, range: Range, to: State) -> Result<(), Errno> {
        self.0
            .set_memory_attributes(range.gpa(), range.size(), to == State::Private)
    }

    /// The last call for `done` failed; it may have done a part of its work.
    #[cold]
    fn failed(&self, done: Range, errno: Errno, before: Before<'_>) -> Failure {
        let undo = self.restore(done, before);
        Failure::Kernel { errno, undo }
    }

    /// Sets the attributes as they were.
    pub(super) fn restore(&self, range: Range, before: Before<'_>) -> Result<(), Errno> {
        for chunk in range.chunks() {
            for run in before.runs(chunk) {
                self.call(run.range, run.state)?;
            }
        }
        Ok(())
    }
}
