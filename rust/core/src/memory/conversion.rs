//! A conversion is one transaction: lock the range, have KVM enforce the new state, discard the old side, commit the
//! map.
//!
//! A failure before the discard undoes what was done. The discard destroys bytes, so after it there is no way back.

use std::sync::atomic::Ordering;

use super::address::{Range, Run, State};
use super::enforcement::{Before, NotEnforced};
use super::guest_memory::{FaultStatus, FaultingAccess, GuestMemory};
use super::listeners::{Changes, Present};
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
    Interrupted(Progress),
    /// The pages changed meanwhile, so nothing was converted.
    Superseded,
}

/// How far a conversion came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// How many of the range's bytes, from its start, are in the wanted state now.
    pub size: u64,
    /// Of these, the bytes whose state changed.
    pub changed: u64,
}

/// What is to be converted, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    pub range: Range,
    /// The part of the range that is converted if not all of it may be: what it was before a policy widened it.
    pub least: Range,
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
    /// Only if these pages are still in the states that the policy was told, but for what this conversion itself changed.
    AsTold(&'a Seen),
    /// Only if this access would still fault.
    StillFaulting(FaultingAccess),
}

impl Progress {
    /// What was converted before this error.
    pub(crate) fn before(error: &ConvertError) -> Self {
        match *error {
            ConvertError::Partly { size, changed, .. } => Self { size, changed },
            _ => Self::default(),
        }
    }
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
        let range = self.range(gpa, size)?;
        let order = Order {
            range,
            least: range,
            to,
            keep,
            max_shared: None,
        };
        self.convert_if(&order, Condition::Always, &|| false)
    }

    /// Converts in one transaction, or part by part for a large range; `cancel` is called between parts.
    #[inline(always)]
    pub(crate) fn convert_if(
        &self,
        order: &Order,
        condition: Condition<'_>,
        cancel: &dyn Fn() -> bool,
    ) -> Result<Converted, ConvertError> {
        let mut progress = Progress::default();
        let converted = self.convert_as_far_as_possible(order, condition, cancel, &mut progress);
        converted.map_err(|error| failed_after(order.range.gpa(), progress, error))
    }

    #[inline]
    fn convert_as_far_as_possible(
        &self,
        order: &Order,
        condition: Condition<'_>,
        cancel: &dyn Fn() -> bool,
        progress: &mut Progress,
    ) -> Result<Converted, ConvertError> {
        let range = order.range;
        let one = order.max_shared.is_none() && self.enforcement.is_one_part(range) && condition.is_about(range);
        if !one {
            return self.convert_in_parts(order, condition, cancel, progress);
        }
        let (held, states) = self.states.hold_and_access(range);
        let before = match condition {
            Condition::AsTold(told) if told.is_current(states.map()) => told.state,
            _ if !self.is_wanted(&condition, None, &states) => return Ok(Converted::Superseded),
            _ => states.map().uniform(range),
        };
        drop(states);
        self.transaction(order, range, Some(held), before, progress)?;
        Ok(Converted::Done {
            changed: progress.changed,
        })
    }

    /// Whether the condition holds: for a later part of the range, for that part.
    #[inline]
    fn is_wanted(&self, condition: &Condition<'_>, later: Option<Range>, states: &States) -> bool {
        match condition {
            Condition::Always => true,
            Condition::StillFaulting(fault) => self.status(fault, states) == FaultStatus::Request,
            Condition::AsTold(told) => {
                let pages = later.map_or(Some(told.range), |part| part.intersect(&told.range));
                pages.is_none_or(|pages| told.is_still_so(pages, states.map()))
            }
        }
    }

    #[inline(never)]
    fn convert_in_parts(
        &self,
        order: &Order,
        condition: Condition<'_>,
        cancel: &dyn Fn() -> bool,
        progress: &mut Progress,
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
            Some(max) => self.within_quota(order, max, condition, cancel, progress),
            None => self.in_parts(order, held.is_none(), condition, cancel, progress),
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
        progress: &mut Progress,
    ) -> Result<Converted, ConvertError> {
        let (gpa, size) = (order.range.gpa(), order.range.size());
        let mut states = self.states.lock();
        let private = states.private_in(order.range);
        if !states.reserve(private, max) {
            return Err(ConvertError::OverQuota { gpa, size, max });
        }
        drop(states);
        let done = self.in_parts(order, false, condition, cancel, progress);
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
        progress: &mut Progress,
    ) -> Result<Converted, ConvertError> {
        let range = order.range;
        let mut start = range.gpa();
        while let Some(left) = Range::new(start, range.end() - start) {
            let later = progress.size > 0;
            if later && cancel() {
                return Ok(Converted::Interrupted(*progress));
            }
            let part = self.enforcement.part(left);
            let held = hold.then(|| self.states.hold(part));
            let states = self.states.lock();
            if !self.is_wanted(&condition, later.then_some(part), &states) {
                return Ok(match later {
                    false => Converted::Superseded,
                    true => Converted::Interrupted(*progress),
                });
            }
            let before = states.map().uniform(part);
            drop(states);
            self.transaction(order, part, held, before, progress)?;
            start = part.end();
        }
        Ok(Converted::Done {
            changed: progress.changed,
        })
    }

    /// The transaction, for a range that is locked. `before` is the state of all its pages, `None` if they differ.
    /// `held` is `None` if the caller has locked more than the range. What was changed is added to `progress`, also if
    /// something fails after that.
    #[inline(always)]
    fn transaction(
        &self,
        order: &Order,
        range: Range,
        held: Option<Held<'_>>,
        before: Option<State>,
        progress: &mut Progress,
    ) -> Result<(), ConvertError> {
        if self.frozen.load(Ordering::SeqCst) {
            return Err(self.why_frozen(range));
        }
        if before == Some(order.to) {
            progress.size += range.size();
            return Ok(());
        }
        if !self.unpaged.is_empty() {
            let closed = self.close_before_conversion(range);
            closed.map_err(|errno| undone(range, errno))?;
        }
        let cleaned = self.clean_new_side(order, range);
        cleaned.map_err(|errno| undone(range, errno))?;
        if !self.listeners.is_empty() {
            return self.transaction_with_listeners(order, range, before, progress);
        }
        let enforced = self.enforce(order, range, before);
        enforced.map_err(|failure| self.not_enforced(range, failure))?;
        // Where pages can be missing there are listeners, or it is as if there were.
        let discarded = match order.keep {
            true => Ok(()),
            false => self.free_side(order.to.other(), range),
        };
        let mut states = match held {
            Some(held) => held.release(),
            None => self.states.lock(),
        };
        self.commit(order, range, &mut states, progress);
        discarded.map_err(|errno| not_discarded(range, errno))
    }

    /// The same with listeners, which may refuse it. The caller holds the range until this returns, because listeners
    /// are called while it is locked.
    #[cold]
    fn transaction_with_listeners(
        &self,
        order: &Order,
        range: Range,
        before: Option<State>,
        progress: &mut Progress,
    ) -> Result<(), ConvertError> {
        let snapshot = self.states.lock().snapshot();
        let changes = Changes {
            before: &snapshot,
            range,
            to: order.to,
        };
        let listeners = self.listeners.present();
        let done = self.with_listeners(&listeners, order, &changes, before, progress);
        if done.is_err() {
            let present = |pages| self.states.lock().runs_in(pages);
            // The first failure is the one to report.
            let _ = listeners.tell_again(range, &present);
        }
        done
    }

    fn with_listeners(
        &self,
        listeners: &Present,
        order: &Order,
        changes: &Changes<'_>,
        before: Option<State>,
        progress: &mut Progress,
    ) -> Result<(), ConvertError> {
        let range = changes.range;
        self.forget_new_side(order, range)
            .map_err(|errno| undone(range, errno))?;
        listeners.prepare(changes)?;
        if let Err(failure) = self.enforce(order, range, before) {
            let failure = self.not_enforced(range, failure);
            // If KVM's state is unknown, that error is returned rather than the listener's.
            let aborted = listeners.abort(changes).err();
            let said = aborted.filter(|_| failure.guest_errno().is_some());
            return Err(said.map_or(failure, ConvertError::Listener));
        }
        let discarded = self.discard_old_side(order, range);
        self.commit(order, range, &mut self.states.lock(), progress);
        let heard = listeners.commit(changes);
        discarded.map_err(|errno| not_discarded(range, errno))?;
        heard.map_err(ConvertError::Listener)
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

    /// Bytes that KVM wrote to the other side for a page, and that are missing since a snapshot, must not appear either.
    fn forget_new_side(&self, order: &Order, range: Range) -> Result<(), Errno> {
        let is_missing = self.sides.of(order.to).is_missing(range);
        match is_missing && !self.kept.load(Ordering::Relaxed) {
            true => self.discard_emulated(range, order.to),
            false => Ok(()),
        }
    }

    fn discard_old_side(&self, order: &Order, range: Range) -> Result<(), Errno> {
        match order.keep {
            true => Ok(()),
            false => self.discard_side(order.to.other(), range),
        }
    }

    #[inline]
    fn commit(&self, order: &Order, range: Range, states: &mut States, progress: &mut Progress) {
        let changed = self.states.set(states, range, order.to);
        if order.max_shared.is_some() && order.to == State::Shared {
            states.release(changed);
        }
        progress.size += range.size();
        progress.changed += changed;
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
                self.frozen.store(true, Ordering::SeqCst);
                ConvertError::Inconsistent { gpa, size, errno, undo }
            }
        }
    }

    /// Why nothing is converted any more.
    #[cold]
    fn why_frozen(&self, range: Range) -> ConvertError {
        if self.closed.load(Ordering::SeqCst) {
            return ConvertError::Closed;
        }
        let (gpa, size) = (range.gpa(), range.size());
        let errno = Errno(libc::EIO);
        let undo = errno;
        ConvertError::Inconsistent { gpa, size, errno, undo }
    }

    /// KVM's own writes, for emulation or a paravirtual clock, meet host memory whatever the page's state: under
    /// attributes the shared side, under traps the side of the view that was used. Those bytes must not appear when the
    /// page comes to that side, and they are freed before it does: after that, the guest may have written there itself.
    #[inline]
    fn clean_new_side(&self, order: &Order, range: Range) -> Result<(), Errno> {
        if order.keep {
            self.kept.store(true, Ordering::Relaxed);
        }
        let emulated = match self.enforcement.mode() {
            EnforcementMode::Attributes => order.to == State::Shared,
            EnforcementMode::Traps => true,
            EnforcementMode::Memslots => false,
        };
        if !emulated || self.kept.load(Ordering::Relaxed) {
            return Ok(());
        }
        match self.hypervisor.has_data(&self.sides.of(order.to).part(range))? {
            true => self.discard_emulated(range, order.to),
            false => Ok(()),
        }
    }

    #[cold]
    fn discard_emulated(&self, range: Range, to: State) -> Result<(), Errno> {
        // Pages that are in that state already keep their bytes.
        let runs = Run::list(self.states.lock().map().runs_in(range))?;
        let mut others = runs.iter().filter(|run| run.state != to);
        others.try_for_each(|run| self.discard_side(to, run.range))
    }
}

/// The error of a conversion that began at `gpa`, with what it did all the same.
#[cold]
fn failed_after(gpa: u64, progress: Progress, error: ConvertError) -> ConvertError {
    match progress.changed {
        0 => error,
        _ => ConvertError::Partly {
            gpa,
            size: progress.size,
            changed: progress.changed,
            source: Box::new(error),
        },
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
