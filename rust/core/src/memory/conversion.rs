//! A conversion is one transaction: lock the range, have KVM enforce the new state, discard the old side, commit the
//! map.
//!
//! A failure before the discard undoes what was done. The discard destroys bytes, so after it there is no way back.

use std::sync::atomic::Ordering;

use super::address::{Range, State};
use super::enforcement::{Before, NotEnforced};
use super::guest_memory::{FaultStatus, FaultingAccess, GuestMemory};
use super::listeners::Changes;
use super::page_states::{Held, Seen, States};
use crate::errno::Errno;
use crate::error::ConvertError;
use crate::hypervisor::host::EnforcementMode;

/// What became of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Converted {
    /// All of the range is in the wanted state.
    Done {
        /// Bytes whose state changed.
        changed: u64,
    },
    /// Only a first part of the range was converted: the run is ending, or the rest is no longer in the states that the
    /// policy was told.
    Interrupted {
        /// Bytes whose state changed.
        changed: u64,
        /// How many of the range's bytes, from its start, are in the wanted state now.
        size: u64,
    },
    /// The pages changed meanwhile, so nothing was converted.
    Superseded,
}

/// What is to be converted, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub range: Range,
    pub to: State,
    /// Do not discard the old side.
    pub keep: bool,
    /// Refuse if more bytes than this would be shared afterwards.
    pub max_shared: Option<u64>,
}

/// What must be true, once the pages are locked, for the conversion to be carried out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Condition<'a> {
    /// Always carry it out.
    Always,
    /// Only if these pages are still in the states that the policy was told, or already in the wanted state.
    AsTold(&'a Seen),
    /// Only if this access would still fault.
    StillFaulting(FaultingAccess),
}

impl Condition<'_> {
    /// Whether locking `range` is enough to check it.
    #[inline]
    fn is_about(&self, range: Range) -> bool {
        match self {
            Condition::Always => true,
            Condition::AsTold(told) => told.range == range,
            Condition::StillFaulting(fault) => fault.page == range,
        }
    }
}

impl GuestMemory {
    /// Converts for the host, without asking the policy. `keep` leaves the old side as it is.
    ///
    /// # Errors
    /// See [`ConvertError`]: unless it says otherwise, nothing was changed.
    pub fn convert(&self, gpa: u64, size: u64, to: State, keep: bool) -> Result<Converted, ConvertError> {
        let order = Order {
            range: self.range(gpa, size)?,
            to,
            keep,
            max_shared: None,
        };
        self.convert_if(&order, Condition::Always, &|| false)
    }

    /// Converts in one transaction, or part by part for a large range; `cancel` is called between parts.
    pub(crate) fn convert_if(
        &self,
        order: &Order,
        condition: Condition<'_>,
        cancel: &dyn Fn() -> bool,
    ) -> Result<Converted, ConvertError> {
        let range = order.range;
        let one = order.max_shared.is_none() && self.enforcement.is_one_part(range) && condition.is_about(range);
        if !one {
            return self.convert_in_parts(order, condition, cancel);
        }
        let (held, states) = self.states.hold_and_access(range);
        let before = match condition {
            Condition::AsTold(told) if told.is_current(states.map()) => told.state,
            _ if !self.is_wanted(order, &condition, range, &states) => return Ok(Converted::Superseded),
            _ => states.map().uniform(range),
        };
        drop(states);
        let changed = self.transaction(order, range, Some(held), before)?;
        Ok(Converted::Done { changed })
    }

    /// Whether the condition holds for the part of the range that is locked.
    #[inline]
    fn is_wanted(&self, order: &Order, condition: &Condition<'_>, part: Range, states: &States) -> bool {
        match condition {
            Condition::Always => true,
            Condition::StillFaulting(fault) => self.status(fault, states) == FaultStatus::Request,
            Condition::AsTold(told) => {
                let Some(both) = part.intersect(&told.range) else {
                    return true;
                };
                told.is_still_so(both, states.map()) || states.map().uniform(both) == Some(order.to)
            }
        }
    }

    #[inline(never)]
    fn convert_in_parts(
        &self,
        order: &Order,
        condition: Condition<'_>,
        cancel: &dyn Fn() -> bool,
    ) -> Result<Converted, ConvertError> {
        let quota = order.max_shared.filter(|_| order.to == State::Shared);
        // The page that faulted is locked too, so that it cannot change between the check and the conversion. If
        // nothing is locked here, `in_parts` locks each part.
        let (held, condition) = match (condition, quota) {
            (Condition::StillFaulting(fault), _) => {
                let (held, states) = self.states.hold_and_access(order.range.hull(&fault.page));
                if self.status(&fault, &states) != FaultStatus::Request {
                    return Ok(Converted::Superseded);
                }
                drop(states);
                (Some(held), Condition::Always)
            }
            (condition, Some(_)) => (Some(self.states.hold(order.range)), condition),
            (condition, None) => (None, condition),
        };
        match quota {
            Some(max) => self.within_quota(order, max, condition, cancel),
            None => self.in_parts(order, held.is_none(), condition, cancel),
        }
    }

    /// Reserves the bytes that will become shared, then converts. The caller has locked the range, so their number
    /// cannot change.
    fn within_quota(
        &self,
        order: &Order,
        max: u64,
        condition: Condition<'_>,
        cancel: &dyn Fn() -> bool,
    ) -> Result<Converted, ConvertError> {
        let (gpa, size) = (order.range.gpa(), order.range.size());
        let mut states = self.states.lock();
        let private = states.private_in(order.range);
        if !states.reserve(private, max) {
            return Err(ConvertError::OverQuota { gpa, size, max });
        }
        drop(states);
        let done = self.in_parts(order, false, condition, cancel);
        // `commit` released the bytes that became shared; this releases those that did not.
        let mut states = self.states.lock();
        let left = states.private_in(order.range);
        states.release(left);
        done
    }

    /// Each part is a transaction of its own: if one fails it is undone, and the parts before it stay converted.
    fn in_parts(
        &self,
        order: &Order,
        hold: bool,
        condition: Condition<'_>,
        cancel: &dyn Fn() -> bool,
    ) -> Result<Converted, ConvertError> {
        let mut changed = 0;
        let range = order.range;
        let mut start = range.gpa();
        while let Some(left) = Range::new(start, range.end() - start) {
            let done = start - range.gpa();
            if done > 0 && cancel() {
                return Ok(Converted::Interrupted { changed, size: done });
            }
            let part = self.enforcement.part(left);
            let held = hold.then(|| self.states.hold(part));
            let states = self.states.lock();
            if !self.is_wanted(order, &condition, part, &states) {
                return Ok(match done {
                    0 => Converted::Superseded,
                    size => Converted::Interrupted { changed, size },
                });
            }
            let before = states.map().uniform(part);
            drop(states);
            changed += self.transaction(order, part, held, before)?;
            start = part.end();
        }
        Ok(Converted::Done { changed })
    }

    /// The transaction, for a range that is locked. `before` is the state of all its pages, `None` if they differ.
    /// `held` is `None` if the caller has locked more than the range. Returns the bytes whose state changed.
    #[inline]
    fn transaction(
        &self,
        order: &Order,
        range: Range,
        held: Option<Held<'_>>,
        before: Option<State>,
    ) -> Result<u64, ConvertError> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(already_broken(range));
        }
        if before == Some(order.to) {
            return Ok(0);
        }
        let cleaned = self.clean_shared_side(order, range);
        cleaned.map_err(|errno| undone(range, errno))?;
        if !self.listeners.is_empty() {
            return self.transaction_with_listeners(order, range, before);
        }
        let enforced = self.enforce(order, range, before);
        enforced.map_err(|failure| self.not_enforced(range, failure))?;
        let discarded = self.discard_old_side(order, range);
        let mut states = match held {
            Some(held) => held.release(),
            None => self.states.lock(),
        };
        let changed = self.commit(order, range, &mut states);
        discarded.map_err(|errno| not_discarded(range, errno))?;
        Ok(changed)
    }

    /// The same with listeners, which may refuse it. The caller holds the range until this returns, because listeners
    /// are called while it is locked.
    #[cold]
    fn transaction_with_listeners(
        &self,
        order: &Order,
        range: Range,
        before: Option<State>,
    ) -> Result<u64, ConvertError> {
        let snapshot = self.states.lock().snapshot();
        let changes = Changes {
            before: &snapshot,
            range,
            to: order.to,
        };
        self.listeners.prepare(&changes)?;
        if let Err(failure) = self.enforce(order, range, before) {
            let failure = self.not_enforced(range, failure);
            // If KVM's state is unknown, that error is returned rather than the listener's.
            let aborted = self.listeners.abort(&changes).err();
            let said = aborted.filter(|_| failure.guest_errno().is_some());
            return Err(said.map_or(failure, ConvertError::Listener));
        }
        let discarded = self.discard_old_side(order, range);
        let changed = self.commit(order, range, &mut self.states.lock());
        let heard = self.listeners.commit(&changes);
        discarded.map_err(|errno| not_discarded(range, errno))?;
        heard.map_err(ConvertError::Listener)?;
        Ok(changed)
    }

    #[inline]
    fn enforce(&self, order: &Order, range: Range, before: Option<State>) -> Result<(), NotEnforced> {
        let runs = |part| self.states.lock().runs_in(part);
        let before = Before {
            uniform: before,
            runs: &runs,
        };
        self.enforcement.apply(range, order.to, before)
    }

    #[inline]
    fn discard_old_side(&self, order: &Order, range: Range) -> Result<(), Errno> {
        match order.keep {
            true => Ok(()),
            false => self.discard_side(order.to.other(), range),
        }
    }

    #[inline]
    fn commit(&self, order: &Order, range: Range, states: &mut States) -> u64 {
        let changed = self.states.set(states, range, order.to);
        if order.max_shared.is_some() && order.to == State::Shared {
            states.release(changed);
        }
        changed
    }

    #[cold]
    fn not_enforced(&self, range: Range, failure: NotEnforced) -> ConvertError {
        self.states.disturb(range);
        let (gpa, size) = (range.gpa(), range.size());
        match failure {
            NotEnforced::NoSlots(out) => ConvertError::NoSlots {
                gpa,
                size,
                needed: out.needed,
                available: out.available,
            },
            NotEnforced::Kernel { errno, undo: Ok(()) } => undone(range, errno),
            NotEnforced::Kernel { errno, undo: Err(undo) } => {
                self.broken.store(true, Ordering::SeqCst);
                ConvertError::Inconsistent { gpa, size, errno, undo }
            }
        }
    }

    /// KVM's emulation writes to the shared side even while the page is private. Those bytes must not appear when the
    /// page becomes shared, and they are freed before it does: after that, the guest may have written there itself.
    #[inline]
    fn clean_shared_side(&self, order: &Order, range: Range) -> Result<(), Errno> {
        if order.keep {
            self.kept.store(true, Ordering::Relaxed);
        }
        let emulated = order.to == State::Shared && self.enforcement.mode() == EnforcementMode::Attributes;
        if !emulated || self.kept.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.hypervisor.has_data(&self.sides.shared.part(range))? {
            true => self.discard_emulated(range),
            false => Ok(()),
        }
    }

    #[cold]
    fn discard_emulated(&self, range: Range) -> Result<(), Errno> {
        // Pages that are shared already keep their bytes.
        let runs = self.states.lock().runs_in(range);
        let mut private = runs.iter().filter(|run| run.state == State::Private);
        private.try_for_each(|run| self.discard_side(State::Shared, run.range))
    }
}

fn undone(range: Range, errno: Errno) -> ConvertError {
    let (gpa, size) = (range.gpa(), range.size());
    ConvertError::Undone { gpa, size, errno }
}

fn not_discarded(range: Range, errno: Errno) -> ConvertError {
    let (gpa, size) = (range.gpa(), range.size());
    ConvertError::Discard { gpa, size, errno }
}

#[cold]
fn already_broken(range: Range) -> ConvertError {
    let (gpa, size) = (range.gpa(), range.size());
    let errno = Errno(libc::EIO);
    let undo = errno;
    ConvertError::Inconsistent { gpa, size, errno, undo }
}
