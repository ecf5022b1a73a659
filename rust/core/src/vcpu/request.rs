//! What explicit and implicit requests have in common: turning a decision into an order, and logging what was done.

use super::running::{RunningVcpu, hook_failed};
use crate::errno::Errno;
use crate::error::{ConvertError, Error, Failure, Site};
use crate::events::event::{Done, Outcome, RecordedDecision};
use crate::memory::address::{Range, State};
use crate::memory::conversion::{Converted, Order};
use crate::policy::decision::{Convert, Decision};
use crate::policy::trial::NOT_REMEMBERED_HERE;

/// Bytes of one KVM_PRE_FAULT_MEMORY call at most, so that ending a run does not have to wait long for it.
const PREFAULT_CHUNK: u64 = 2 << 20;
/// KVM_PRE_FAULT_MEMORY is given up after this many EAGAIN or EINTR in a row; the guest then faults the pages in
/// itself.
const PREFAULT_BOUND: u32 = 1000;

impl RunningVcpu<'_> {
    /// Logs a Convert and makes an order of it: the policy may have chosen another range or state than was asked for.
    #[inline]
    pub(super) fn order(&mut self, convert: &Convert, asked: Range, to: State) -> Result<Order, Failure> {
        let decision = RecordedDecision::convert(convert, asked, to);
        self.state.log.decided(&decision);
        let range = match (decision.gpa, decision.size) == (asked.gpa(), asked.size()) {
            true => asked,
            false => self.other_range(decision.gpa, decision.size)?,
        };
        Ok(Order {
            range,
            to: decision.to,
            keep: convert.keep,
            max_shared: convert.max_shared,
        })
    }

    #[cold]
    fn other_range(&self, gpa: u64, size: u64) -> Result<Range, Failure> {
        let range = self.context.memory.range(gpa, size);
        Ok(range.map_err(|error| format!("Convert: {error}"))?)
    }

    /// Logs any decision but Convert. A Remember that reaches this point, or a hook that failed, is an error.
    pub(super) fn decided(
        &mut self,
        decision: Result<Decision, Failure>,
        asked: Range,
        to: State,
    ) -> Result<Decision, Error> {
        let failure = match decision {
            Ok(Decision::Remember(_)) => NOT_REMEMBERED_HERE.into(),
            Ok(decision) => {
                self.state.log.decided(&RecordedDecision::of(&decision, asked, to));
                return Ok(decision);
            }
            Err(failure) => failure,
        };
        let site = self.site(Some(asked));
        Err(hook_failed(site, failure))
    }

    /// Logs and counts the request as denied: the quota is the policy's, although it is checked by the conversion.
    pub(super) fn over_quota(&mut self) {
        self.tally.denied += 1;
        self.state.log.refused(Errno(libc::EINVAL));
    }

    /// Logs and counts what was done. Returns the errno for an explicit request: 0 if all of the range was converted.
    #[inline]
    pub(super) fn converted(&mut self, order: &Order, converted: Converted) -> i32 {
        let Order { range, to, .. } = *order;
        let (changed, size, outcome, errno) = match converted {
            Converted::Done { changed } => {
                self.tally.conversions += 1;
                (changed, range.size(), Outcome::Converted, 0)
            }
            Converted::Interrupted { changed, size } => {
                self.tally.retries += 1;
                (changed, size, Outcome::Retried, libc::EAGAIN)
            }
            Converted::Superseded => {
                self.tally.stale += 1;
                self.close_as(Outcome::Superseded, 0);
                return 0;
            }
        };
        match to {
            State::Private => self.tally.bytes_to_private += changed,
            State::Shared => self.tally.bytes_to_shared += changed,
        }
        let done = Done {
            gpa: range.gpa(),
            size,
            to,
            changed,
        };
        self.state.log.ended(outcome, errno, &done);
        errno
    }

    /// Has KVM map what was just converted. Pages that it cannot map are faulted in by the guest, as without this.
    ///
    /// The ioctl may overwrite the exit data in kvm_run, so the answer to a request must be written after this.
    pub(super) fn prefault(&mut self, range: Range, to: State) {
        if !self.context.pre_fault {
            return;
        }
        let view = self.context.memory.views().view(range, to);
        let mut start = view.gpa();
        let mut refused = 0;
        while start < view.end() && !self.context.control.leaving() {
            let size = (view.end() - start).min(PREFAULT_CHUNK);
            match self.state.hv.pre_fault(start, size) {
                Ok(done) if done > 0 => {
                    start += done.min(size);
                    self.tally.bytes_prefaulted += done;
                    refused = 0;
                }
                Err(Errno(libc::EAGAIN | libc::EINTR)) if refused < PREFAULT_BOUND => {
                    refused += 1;
                    self.back_off(refused);
                }
                _ => break,
            }
        }
    }
}

/// A conversion that failed; a listener's failure is treated as a hook's.
pub(super) fn conversion_failed(site: Site, source: ConvertError) -> Error {
    match source {
        ConvertError::Listener(failure) => hook_failed(site, failure),
        source => Error::Conversion { site, source },
    }
}
