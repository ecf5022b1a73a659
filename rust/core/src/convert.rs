//! A conversion is one transaction: validate, lock, make KVM enforce it, discard the stale side, commit the map.
//!
//! Until the discard a failure undoes what was done. The discard is the point of no return: it destroys bytes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::attributes::{PAGE_SIZE, Range, Run, State};
use crate::enforce::{self, Enforcement, Mode};
use crate::errno::Errno;
use crate::error::{ConvertError, Failure};
use crate::hypervisor::Hypervisor;
use crate::kick::Kick;
use crate::ledger::{Examined, Held, HeldSpot, Ledger, Look, Seen, Snapshot, Spot};
use crate::listener::{Conversion, Listener, Listeners};
use crate::memory::{Backing, GuestMemory};
use crate::views::Views;

/// How much memory a machine's guest occupies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    /// Bytes of the shared side.
    pub shared: u64,
    /// Bytes of the private side.
    pub private: u64,
    /// Whether `private` was counted. Else it is all that may be there: the bytes in state private.
    pub exact: bool,
}

/// What was true when a vCPU entered the guest; a fault is judged against it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    seen: Seen,
    slot_epoch: u64,
}

/// The same of one page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sight {
    generation: u64,
    slot_epoch: u64,
}

/// What became of a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Converted {
    /// All of the range is in the wanted state; this many bytes were not before.
    Done {
        /// Bytes whose state changed.
        changed: u64,
    },
    /// Only a first part of the range was done: the run is ending, or the rest is not as the policy was told.
    Interrupted {
        /// Bytes whose state changed.
        changed: u64,
        /// How many of the range's bytes, from its start, are in the wanted state now.
        size: u64,
    },
    /// The pages changed meanwhile; nothing was done.
    Superseded,
}

/// What a fault's page looks like now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The page is not in the accessed state, and that is no leftover of an old one.
    Differs,
    /// The page, or what enforces it, changed since the vCPU entered.
    Stale,
    /// The page is in the accessed state and has been all the time.
    Agrees,
}

/// What is to be converted, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Order {
    /// The pages, and how they were.
    pub seen: Look,
    /// What the policy was told of, where that was something else.
    pub told: Option<Look>,
    pub to: State,
    /// The stale side stays as it is.
    pub keep: bool,
    /// Refuse if more bytes than this would be shared then.
    pub max_shared: Option<u64>,
}

/// What was done of a transaction: KVM enforces it.
struct Enforced {
    /// What was true before, where listeners were told.
    told: Option<Box<Snapshot>>,
    discarded: Result<(), Errno>,
}

/// The condition under which an implicit conversion is still wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub page: Range,
    pub access: State,
    pub sight: Sight,
}

/// Guest memory with its states: the truth, its enforcement, and the way from one to the next.
pub struct Gate {
    views: Views,
    ledger: Ledger,
    listeners: Listeners,
    enforcement: Enforcement,
    vm: Arc<dyn Hypervisor>,
    memory: Arc<GuestMemory>,
    vcpus: Vec<Arc<Kick>>,
    broken: AtomicBool,
    /// Somebody wanted stale bytes back, so none are cleaned away.
    kept: AtomicBool,
}

impl Gate {
    pub(crate) fn new(
        ledger: Ledger,
        views: Views,
        enforcement: Enforcement,
        vm: Arc<dyn Hypervisor>,
        memory: Arc<GuestMemory>,
        vcpus: Vec<Arc<Kick>>,
    ) -> Self {
        Self {
            views,
            ledger,
            listeners: Listeners::default(),
            enforcement,
            vm,
            memory,
            vcpus,
            broken: AtomicBool::new(false),
            kept: AtomicBool::new(false),
        }
    }

    /// Where memory appears.
    pub fn views(&self) -> Views {
        self.views
    }

    pub(crate) fn enforcement(&self) -> &Enforcement {
        &self.enforcement
    }

    /// Reads the map. Not for deciding and then acting: only a range's lock holds its state still.
    pub fn with_map<T>(&self, read: impl FnOnce(&Ledger) -> T) -> T {
        read(&self.ledger)
    }

    /// The map as it is now.
    pub fn snapshot(&self) -> Snapshot {
        self.ledger.snapshot()
    }

    /// A vCPU is about to enter the guest for the first time.
    pub(crate) fn entry(&self) -> Entry {
        Entry {
            seen: self.ledger.look(),
            slot_epoch: self.enforcement.epoch(),
        }
    }

    /// It is about to enter again.
    pub(crate) fn enter_again(&self, entry: &mut Entry) {
        self.ledger.look_again(&mut entry.seen);
        self.enter_with_slots(entry);
    }

    /// It is about to enter again, and had nothing to do with memory since.
    #[inline]
    pub(crate) fn enter_with_slots(&self, entry: &mut Entry) {
        entry.slot_epoch = self.enforcement.epoch();
    }

    /// What was true of the page that it faulted on.
    pub(crate) fn sight(&self, entry: &mut Entry, page: Range) -> Sight {
        Sight {
            generation: self.ledger.seen(&mut entry.seen, page.gpa()),
            slot_epoch: entry.slot_epoch,
        }
    }

    /// It asks for these pages.
    #[inline]
    pub(crate) fn asked(&self, entry: &mut Entry, seen: &Look) {
        self.ledger.touch(&mut entry.seen, seen);
    }

    /// Holds the states of `range` still.
    pub(crate) fn hold(&self, range: Range) -> Held<'_> {
        self.ledger.hold(range)
    }

    /// The states of `range` as they are now.
    #[inline(always)]
    pub(crate) fn look_at(&self, range: Range) -> Look {
        self.ledger.look_at(range)
    }

    /// "private", "shared" or "mixed".
    pub fn describe(&self, range: Range) -> &'static str {
        self.with_map(|map| map.uniform(range)).map_or("mixed", State::as_str)
    }

    /// What to make of a fault on `wanted.page`. Waits for a conversion in flight there.
    pub(crate) fn examine(&self, wanted: Wanted, vcpu: u32) -> (Standing, Examined) {
        let examined = self.ledger.examine(wanted.page, wanted.sight.generation, vcpu);
        let standing = match self.standing(wanted, examined.state, examined.changed) {
            Standing::Agrees => {
                // A slot under way is as good a reason for the fault as one that changed since.
                self.enforcement.settled();
                match self.enforcement.epoch() == wanted.sight.slot_epoch {
                    true => Standing::Agrees,
                    false => Standing::Stale,
                }
            }
            standing => standing,
        };
        (standing, examined)
    }

    fn standing(&self, wanted: Wanted, state: State, changed: bool) -> Standing {
        match (state == wanted.access, changed) {
            (true, false) => Standing::Agrees,
            (true, true) => Standing::Stale,
            // With one view the access has no state of its own: KVM sampled the page's, perhaps before it changed.
            (false, true) if !self.views.split() => Standing::Stale,
            (false, _) => Standing::Differs,
        }
    }

    /// Whether it still differs, with the page held.
    fn still_wanted(&self, wanted: Wanted) -> bool {
        let (state, changed) = self
            .ledger
            .state_and_changed(wanted.page.gpa(), wanted.sight.generation);
        self.standing(wanted, state, changed) == Standing::Differs
    }

    /// How often the page at `gpa` changed since this vCPU began to watch it.
    pub(crate) fn watch(&self, vcpu: u32, gpa: u64) -> u64 {
        self.ledger.watch(vcpu, gpa)
    }

    /// The transaction. `keep` leaves the stale side as it is.
    ///
    /// # Errors
    /// See [`ConvertError`]: unless it says otherwise, nothing was changed.
    pub fn convert(&self, gpa: u64, size: u64, to: State, keep: bool) -> Result<Converted, ConvertError> {
        let order = Order {
            seen: self.look_at(self.range(gpa, size)?),
            told: None,
            to,
            keep,
            max_shared: None,
        };
        self.convert_if(order, &|| false)
    }

    /// Validates a range of pages of this guest.
    pub(crate) fn range(&self, gpa: u64, size: u64) -> Result<Range, ConvertError> {
        let memory = self.views.size();
        let error = ConvertError::Range { gpa, size, memory };
        self.views.range(gpa, size).ok_or(error)
    }

    /// The transaction, or one after the other for a large range; `cancel` is asked in between.
    #[inline(always)]
    pub(crate) fn convert_if(&self, order: Order, cancel: &dyn Fn() -> bool) -> Result<Converted, ConvertError> {
        match self.is_simple(&order) {
            Some(spot) => {
                let (held, before) = self.ledger.hold_spot(&spot, order.seen.uniform);
                self.convert_held(order, held, before)
            }
            None => self.convert_in_parts(order, None, None, cancel),
        }
    }

    /// The same for what a policy wants. If the pages that it was told of are in another state when their turn comes, which
    /// is not the wanted one either, it answered another question: nothing is done then.
    #[inline(always)]
    pub(crate) fn convert_as_told(&self, order: Order, cancel: &dyn Fn() -> bool) -> Result<Converted, ConvertError> {
        match self.is_simple(&order).filter(|_| order.told.is_none()) {
            Some(spot) => {
                let (held, before) = self.ledger.hold_spot(&spot, order.seen.uniform);
                if !held.same && is_news(order.seen.uniform, before, order.to) {
                    return Ok(Converted::Superseded);
                }
                self.convert_held(order, held, before)
            }
            None => self.convert_in_parts(order, None, Some(order.told.unwrap_or(order.seen)), cancel),
        }
    }

    /// The same for a page that faulted, if it still is as it was when it was examined.
    pub(crate) fn convert_if_still_wanted(
        &self,
        order: Order,
        wanted: Wanted,
        cancel: &dyn Fn() -> bool,
    ) -> Result<Converted, ConvertError> {
        match self.is_simple(&order).filter(|_| order.seen.range == wanted.page) {
            Some(spot) => {
                let (held, before) = self.ledger.hold_spot(&spot, order.seen.uniform);
                if !held.same && !self.still_wanted(wanted) {
                    return Ok(Converted::Superseded);
                }
                self.convert_held(order, held, before)
            }
            None => self.convert_in_parts(order, Some(wanted), None, cancel),
        }
    }

    /// Where it is, if one transaction is enough and nothing is asked of it.
    #[inline(always)]
    fn is_simple(&self, order: &Order) -> Option<Spot> {
        if order.max_shared.is_some() || !self.enforcement.is_one_part(order.seen.range) {
            return None;
        }
        order.seen.spot
    }

    /// The transaction, for a range that is held and was in this state, if it was uniform.
    #[inline(always)]
    fn convert_held(&self, order: Order, held: HeldSpot<'_>, before: Option<State>) -> Result<Converted, ConvertError> {
        let range = order.seen.range;
        let changed = match self.enforce(order, range, before)? {
            None => 0,
            Some(Enforced {
                told: None,
                discarded: Ok(()),
            }) => held.set(order.to),
            Some(enforced) => self.commit(order, range, enforced)?,
        };
        Ok(Converted::Done { changed })
    }

    fn convert_in_parts(
        &self,
        order: Order,
        wanted: Option<Wanted>,
        told: Option<Look>,
        cancel: &dyn Fn() -> bool,
    ) -> Result<Converted, ConvertError> {
        let range = order.seen.range;
        let quota = order.max_shared.filter(|_| order.to == State::Shared);
        // The page that faulted is held too, so that it cannot change between the look at it and the conversion. What is
        // not held whole is held part by part.
        let held = match (wanted, quota) {
            (Some(wanted), _) => Some(self.hold(hull(range, wanted.page))),
            (None, Some(_)) => Some(self.hold(range)),
            (None, None) => None,
        };
        if wanted.is_some_and(|wanted| !self.still_wanted(wanted)) {
            return Ok(Converted::Superseded);
        }
        match quota {
            Some(max) => self.within_quota(order, max, told, cancel),
            None => self.in_parts(order, held.is_none(), told, cancel),
        }
    }

    /// With the range held: what it adds is known, whatever others add elsewhere.
    fn within_quota(
        &self,
        order: Order,
        max: u64,
        told: Option<Look>,
        cancel: &dyn Fn() -> bool,
    ) -> Result<Converted, ConvertError> {
        let range = order.seen.range;
        let private = self.ledger.private_in(range);
        if !self.ledger.reserve(private, max) {
            return Err(ConvertError::OverQuota { range, max });
        }
        let done = self.in_parts(order, false, told, cancel);
        // What was shared was taken from the reservation as it was; the rest will not be.
        let left = self.ledger.private_in(range);
        self.ledger.release(left);
        done
    }

    /// Each part is a transaction: one that fails is undone, those before it stand.
    fn in_parts(
        &self,
        order: Order,
        hold: bool,
        told: Option<Look>,
        cancel: &dyn Fn() -> bool,
    ) -> Result<Converted, ConvertError> {
        let mut changed = 0;
        let range = order.seen.range;
        let mut start = range.gpa();
        while let Some(left) = Range::new(start, range.end() - start) {
            if start > range.gpa() && cancel() {
                let size = start - range.gpa();
                return Ok(Converted::Interrupted { changed, size });
            }
            let part = self.enforcement.part(left);
            let _held = hold.then(|| self.hold(part));
            if told.is_some_and(|told| self.differs(part, &told, order.to)) {
                return Ok(match start - range.gpa() {
                    0 => Converted::Superseded,
                    size => Converted::Interrupted { changed, size },
                });
            }
            if let Some(enforced) = self.enforce(order, part, self.ledger.uniform(part))? {
                changed += self.commit(order, part, enforced)?;
            }
            start = part.end();
        }
        Ok(Converted::Done { changed })
    }

    /// Whether what a policy was told of pages that are in this part, which is held, is not so any more.
    fn differs(&self, part: Range, told: &Look, to: State) -> bool {
        let both = part.intersect(&told.range);
        both.is_some_and(|both| is_news(told.uniform, self.ledger.uniform(both), to))
    }

    /// The transaction up to its commit, with the range held, whose state is known if it is uniform; `None` if there is
    /// nothing to do.
    #[inline(always)]
    fn enforce(&self, order: Order, range: Range, uniform: Option<State>) -> Result<Option<Enforced>, ConvertError> {
        let Order { to, keep, .. } = order;
        if self.broken.load(Ordering::SeqCst) {
            return Err(already_broken(range));
        }
        if uniform == Some(to) {
            return Ok(None);
        }
        let mixed = |part| self.ledger.runs_in(part);
        if let Err(errno) = self.clean(order, range) {
            return Err(ConvertError::Undone { range, errno });
        }
        // Nobody listens as a rule, and then nobody needs to know what exactly changes.
        let told = match self.listeners.is_empty() {
            true => None,
            false => Some(self.prepare(range, to)?),
        };
        if let Err(failure) = self.enforcement.apply(range, to, &self.vcpus, uniform, &mixed) {
            return Err(self.not_enforced(range, to, failure, told));
        }
        let discarded = match keep {
            true => Ok(()),
            false => self.vm.discard(self.side(to.other()), range),
        };
        Ok(Some(Enforced { told, discarded }))
    }

    /// The rest of it: bytes whose state changed.
    fn commit(&self, order: Order, range: Range, enforced: Enforced) -> Result<u64, ConvertError> {
        let to = order.to;
        let changed = self.ledger.set(range, to, order.max_shared.is_some());
        let told = enforced.told.map_or(Ok(()), |before| {
            let conversion = Conversion {
                before: &before,
                range,
                to,
            };
            self.listeners.commit(&conversion)
        });
        enforced
            .discarded
            .map_err(|errno| ConvertError::Discard { range, errno })?;
        told.map_err(ConvertError::Listener)?;
        Ok(changed)
    }

    /// What changes, for listeners; those who have to agree did.
    #[cold]
    fn prepare(&self, range: Range, to: State) -> Result<Box<Snapshot>, ConvertError> {
        let before = Box::new(self.snapshot());
        let conversion = Conversion {
            before: &before,
            range,
            to,
        };
        self.listeners.prepare(&conversion)?;
        Ok(before)
    }

    #[cold]
    fn not_enforced(
        &self,
        range: Range,
        to: State,
        failure: enforce::Failure,
        told: Option<Box<Snapshot>>,
    ) -> ConvertError {
        self.ledger.disturb(range);
        let failure = self.failed(range, failure);
        let abort = |before: Box<Snapshot>| {
            let conversion = Conversion {
                before: &before,
                range,
                to,
            };
            self.listeners.abort(&conversion).err()
        };
        // What KVM enforces matters more than what a listener says of it.
        told.and_then(abort)
            .filter(|_| failure.guest_errno().is_some())
            .map_or(failure, ConvertError::Listener)
    }

    /// What KVM emulates it does on the shared side, whatever the page's attribute says. Such bytes must not be there
    /// when the page comes back, and it is before that they go: later they might be the guest's.
    #[inline(always)]
    fn clean(&self, order: Order, range: Range) -> Result<(), Errno> {
        if order.keep {
            self.kept.store(true, Ordering::Relaxed);
        }
        let emulated = order.to == State::Shared && self.enforcement.mode() == Mode::Attributes;
        if !emulated || self.kept.load(Ordering::Relaxed) || !self.vm.has_data(&self.memory.shared, range)? {
            return Ok(());
        }
        self.discard_left_over(range)
    }

    #[cold]
    fn discard_left_over(&self, range: Range) -> Result<(), Errno> {
        // Of pages that are shared already, the bytes stay.
        let runs = self.ledger.runs_in(range);
        let private = runs.iter().filter(|run| run.state == State::Private);
        private
            .map(|run| run.range)
            .try_for_each(|range| self.vm.discard(&self.memory.shared, range))
    }

    /// Where the bytes of a page in this state are.
    pub(crate) fn side(&self, state: State) -> &Backing {
        match state {
            State::Shared => &self.memory.shared,
            State::Private => &self.memory.private,
        }
    }

    /// Frees pages, poisoned ones among them, in whichever state they are: they read as zeroes.
    ///
    /// # Errors
    /// Those of fallocate(2).
    pub(crate) fn discard(&self, range: Range) -> Result<(), Errno> {
        let _held = self.hold(range);
        let runs: Vec<Run> = self.ledger.runs_in(range);
        runs.iter()
            .try_for_each(|run| self.vm.discard(self.side(run.state), run.range))
    }

    /// Tells a listener the present state and from then on every change, with nothing in between.
    ///
    /// # Errors
    /// The listener's own; then it did not join.
    pub(crate) fn join(&self, listener: Arc<dyn Listener>) -> Result<(), Failure> {
        let all = Range::new(0, self.views.size());
        let _held = all.map(|all| self.hold(all));
        self.listeners.join(listener, &self.snapshot())
    }

    pub(crate) fn listeners(&self) -> &Listeners {
        &self.listeners
    }

    fn failed(&self, range: Range, failure: enforce::Failure) -> ConvertError {
        match failure {
            enforce::Failure::NoSlots(out) => ConvertError::NoSlots {
                range,
                needed: out.needed,
                available: out.available,
            },
            enforce::Failure::Kernel { errno, undo: Ok(()) } => ConvertError::Undone { range, errno },
            enforce::Failure::Kernel { errno, undo: Err(undo) } => {
                self.broken.store(true, Ordering::SeqCst);
                ConvertError::Inconsistent { range, errno, undo }
            }
        }
    }

    /// The first private page of the bytes `[gpa, gpa + len)`, with their pages held; else the result of `access` on
    /// the shared side.
    pub(crate) fn on_shared<T>(
        &self,
        gpa: u64,
        len: u64,
        access: impl FnOnce(&Backing) -> T,
    ) -> Result<Result<T, u64>, ConvertError> {
        let Some(pages) = self.pages(gpa, len) else {
            let memory = self.views.size();
            return Err(ConvertError::Range { gpa, size: len, memory });
        };
        let _held = self.hold(pages);
        let private = self.with_map(|map| {
            let mut runs = map.runs_in(pages).into_iter();
            runs.find(|run| run.state == State::Private).map(|run| run.range.gpa())
        });
        Ok(match private {
            Some(gpa) => Err(gpa),
            None => Ok(access(&self.memory.shared)),
        })
    }

    /// The pages that hold `[gpa, gpa + len)`, if all of them are memory.
    pub(crate) fn pages(&self, gpa: u64, len: u64) -> Option<Range> {
        let start = gpa - gpa % PAGE_SIZE;
        let end = gpa.checked_add(len)?.checked_next_multiple_of(PAGE_SIZE)?;
        Range::new(start, end.checked_sub(start)?).filter(|range| range.end() <= self.views.size())
    }

    /// Resident bytes of both sides.
    pub(crate) fn resident(&self) -> Result<Resident, Errno> {
        let private = self.memory.private.resident()?;
        Ok(Resident {
            shared: self.memory.shared.resident()?.unwrap_or_default(),
            private: private.unwrap_or_else(|| self.with_map(Ledger::private_bytes)),
            exact: private.is_some(),
        })
    }
}

#[cold]
fn already_broken(range: Range) -> ConvertError {
    let errno = Errno(libc::EIO);
    let undo = errno;
    ConvertError::Inconsistent { range, errno, undo }
}

/// Whether a policy that was told of pages in state `told` does not know what it is about to convert: `now`.
fn is_news(told: Option<State>, now: Option<State>, to: State) -> bool {
    told.is_some() && now != told && now != Some(to)
}

fn hull(a: Range, b: Range) -> Range {
    let start = a.gpa().min(b.gpa());
    let end = a.end().max(b.end());
    Range::new(start, end - start).unwrap_or(a)
}
