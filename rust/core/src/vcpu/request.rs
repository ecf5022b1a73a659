//! What explicit and implicit requests have in common: turning a decision into an order, and logging what was done.

use super::running::{RunningVcpu, hook_failed};
use crate::errno::Errno;
use crate::error::{ConvertError, Error, Failure, Site};
use crate::events::event::{Done, Outcome, RecordedDecision};
use crate::memory::address::{Range, State};
use crate::memory::conversion::{Condition, Converted, Order, Progress};
use crate::policy::decision::{Convert, Decision};
use crate::policy::request::Request;
use crate::policy::trial::NOT_REMEMBERED_HERE;

/// Bytes of one KVM_PRE_FAULT_MEMORY call at most, so that ending a run does not have to wait long for it.
const PREFAULT_CHUNK: u64 = 2 << 20;
/// KVM_PRE_FAULT_MEMORY is given up after this many EAGAIN or EINTR in a row; the guest then faults the pages in
/// itself.
const PREFAULT_BOUND: u32 = 1000;

impl RunningVcpu<'_> {
    /// Logs a Convert and makes an order of it: the policy may have chosen another range or state than was asked for. Returns
    /// whether it is as asked, too.
    #[inline(always)]
    pub(super) fn order(&mut self, convert: &Convert, request: Request<'_>) -> Result<(Order, bool), Failure> {
        let (asked, to) = (request.range(), request.to());
        let decision = RecordedDecision::convert(convert, asked, to);
        self.state.log.decided(&decision);
        let (range, least, as_asked) = match (convert.gpa, convert.size, convert.widen) {
            (None, None, None) => (asked, asked, decision.to == to),
            _ => {
                let (range, least) = self.other_range(convert, request)?;
                (range, least, false)
            }
        };
        let order = Order {
            range,
            least,
            to: decision.to,
            keep: convert.keep,
            max_shared: convert.max_shared,
        };
        Ok((order, as_asked))
    }

    /// What is converted if that is not what was asked for, and the least of it.
    #[inline(never)]
    fn other_range(&mut self, convert: &Convert, request: Request<'_>) -> Result<(Range, Range), Failure> {
        let (least, to) = request.target(convert)?;
        let range = request.widened(convert, least);
        if range != least {
            self.log_other_range(convert, range, to);
        }
        Ok((range, least))
    }

    /// Logs a Convert whose range is not the one that the policy named.
    fn log_other_range(&mut self, convert: &Convert, range: Range, to: State) {
        self.state.log.decided(&RecordedDecision {
            gpa: range.gpa(),
            size: range.size(),
            ..RecordedDecision::convert(convert, range, to)
        });
    }

    /// Carries out the order that was made of `convert`. If it was widened and a quota or a listener refuses that, only
    /// what it was before is converted.
    #[inline(always)]
    pub(super) fn carry_out(
        &mut self,
        convert: &Convert,
        (order, as_asked): (&mut Order, bool),
        condition: Condition<'_>,
        request: Request<'_>,
    ) -> Result<Converted, ConvertError> {
        let control = self.context.control;
        let mut converted = self.context.memory.convert_if(order, condition, &|| control.leaving());
        if converted.is_err() {
            self.carry_out_least(convert, order, condition, &mut converted);
        }
        if !as_asked {
            self.tell_policy(order, &converted, request);
        }
        converted
    }

    /// Tells the policy what was converted, where that is not what was asked for.
    #[cold]
    fn tell_policy(&mut self, order: &Order, converted: &Result<Converted, ConvertError>, request: Request<'_>) {
        let size = match converted {
            Ok(Converted::Done { .. }) => order.range.size(),
            Ok(Converted::Interrupted(progress)) => progress.size,
            Ok(Converted::Superseded) => 0,
            Err(source) => Progress::before(source).size,
        };
        let done = Range::new(order.range.gpa(), size);
        if let Some(range) = done.filter(|range| (*range, order.to) != (request.range(), request.to())) {
            let policy = self.context.policy.get(&mut self.policy);
            policy.converted(request, range, order.to);
        }
    }

    #[cold]
    fn carry_out_least(
        &mut self,
        convert: &Convert,
        order: &mut Order,
        condition: Condition<'_>,
        converted: &mut Result<Converted, ConvertError>,
    ) {
        let refused = matches!(
            converted,
            Err(ConvertError::OverQuota { .. } | ConvertError::Refused { .. })
        );
        if refused && order.range != order.least {
            order.range = order.least;
            self.log_other_range(convert, order.range, order.to);
            let control = self.context.control;
            *converted = self.context.memory.convert_if(order, condition, &|| control.leaving());
        }
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
        let size = order.range.size();
        let (progress, outcome, errno) = match converted {
            Converted::Done { changed } => {
                self.tally.conversions += 1;
                (Progress { size, changed }, Outcome::Converted, 0)
            }
            Converted::Interrupted(progress) => {
                self.tally.retries += 1;
                (progress, Outcome::Retried, libc::EAGAIN)
            }
            Converted::Superseded => {
                self.tally.stale += 1;
                self.close_as(Outcome::Superseded, 0);
                return 0;
            }
        };
        self.close_with(order, progress, outcome, errno);
        errno
    }

    /// Logs and counts what was converted.
    #[inline]
    pub(super) fn close_with(&mut self, order: &Order, progress: Progress, outcome: Outcome, errno: i32) {
        let Order { range, to, .. } = *order;
        let Progress { size, changed } = progress;
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
