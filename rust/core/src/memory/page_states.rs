//! The page map with its locks, and the recent changes, by which a spurious fault is recognised.
//!
//! One mutex protects the map and the queue of range locks, and is held only briefly. A range lock is held for a whole
//! conversion and keeps the states of its pages as they are. A single mutex is enough because KVM itself changes
//! attributes and memslots one at a time, under the VM's slots_lock.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::MappedMutexGuard;

use super::address::{PAGE_SIZE, Range, Run, State};
use super::page_map::{AttributeMap, Snapshot};
use super::range_lock::{RangeGuard, RangeLocks};
use super::views::Views;

/// How many of the last changes are kept with their exact ranges: usually more than happen while a vCPU is in the
/// guest. For older ones the map knows only which 2 MiB blocks changed.
const REMEMBERED: usize = 64;
/// The unit in which the map knows when pages changed.
const BLOCK: u64 = 2 << 20;

/// The state of each page.
pub(super) struct PageStates {
    locks: RangeLocks<States>,
    /// A copy of the map's generation, which vCPUs read without the mutex each time they enter the guest.
    generation: AtomicU64,
}

/// What the mutex protects.
pub(super) struct States {
    map: AttributeMap,
    /// The ranges of the last changes; that of generation n is at index n % REMEMBERED.
    recent: Box<[Range; REMEMBERED]>,
    /// For each vCPU, the page that it last faulted on.
    watches: Vec<Watch>,
    /// Whether any vCPU has faulted yet.
    watched: bool,
    /// How many of the map's generations are no changes: those that were undone, and the hole's.
    undone: u64,
    /// Bytes that conversions in progress under a quota are about to make shared.
    reserved: u64,
    /// Bytes of memory, without the hole.
    memory: u64,
}

#[derive(Clone, Copy, Default)]
struct Watch {
    gpa: u64,
    changes: u64,
}

/// The states of a range at one moment: what a policy is told.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub range: Range,
    /// `None` if the range has pages of both states.
    pub state: Option<State>,
    generation: u64,
    /// The states, if the range has both.
    mixed: Option<Box<Snapshot>>,
}

impl Seen {
    /// Whether nothing has changed since, in any page.
    #[inline]
    pub(super) fn is_current(&self, now: &AttributeMap) -> bool {
        self.generation == now.generation()
    }

    /// Whether the states of a part of the range are still the same.
    pub(super) fn is_still_so(&self, part: Range, now: &AttributeMap) -> bool {
        match &self.mixed {
            None => now.uniform(part) == self.state,
            Some(then) => then.runs_in(part).eq(now.runs_in(part)),
        }
    }
}

/// The states, with the mutex locked.
pub(super) type Locked<'a> = MappedMutexGuard<'a, States>;

/// A range whose states nobody else changes.
pub(super) type Held<'a> = RangeGuard<'a, States>;

impl PageStates {
    pub(super) fn new(views: Views, initial: State, vcpus: usize) -> Self {
        let mut map = AttributeMap::new(views.memory_end(), initial);
        if let Some(hole) = views.hole() {
            // So that it counts for nothing that is private.
            map.set(hole, State::Shared);
        }
        #[expect(clippy::expect_used, reason = "a constant range")]
        let page = Range::new(0, PAGE_SIZE).expect("a page");
        Self {
            locks: RangeLocks::new(States {
                undone: map.generation(),
                map,
                recent: Box::new([page; REMEMBERED]),
                watches: vec![Watch::default(); vcpus],
                watched: false,
                reserved: 0,
                memory: views.size(),
            }),
            generation: AtomicU64::new(0),
        }
    }

    /// The map's generation. KVM enforces a change before its generation can be read here.
    #[inline]
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Locks the mutex, which does not wait for held ranges.
    #[inline]
    pub(super) fn lock(&self) -> Locked<'_> {
        self.locks.data()
    }

    /// Waits until no part of `range` is held, and holds it. A thread that holds a range must not hold a second one.
    pub(super) fn hold(&self, range: Range) -> Held<'_> {
        self.locks.lock(range)
    }

    /// The same, as long as `go_on` says so, which is asked each `time`.
    pub(super) fn hold_while(&self, range: Range, time: Duration, go_on: &mut dyn FnMut() -> bool) -> Option<Held<'_>> {
        self.locks.lock_while(range, time, go_on)
    }

    /// The same, and locks the mutex in the same step.
    #[inline]
    pub(super) fn hold_and_access(&self, range: Range) -> (Held<'_>, Locked<'_>) {
        self.locks.lock_and_access(range)
    }

    /// The same for several ranges together.
    pub(super) fn hold_all_and_access(&self, ranges: &[Range]) -> (Held<'_>, Locked<'_>) {
        self.locks.lock_all_and_access(ranges)
    }

    /// Waits until no part of `range` is held, and locks the mutex, without holding the range.
    #[inline]
    pub(super) fn access_when_free(&self, range: Range) -> Locked<'_> {
        self.locks.access_when_free(range)
    }

    /// Sets the state of a range. Returns the bytes whose state changed.
    #[inline]
    pub(super) fn set(&self, states: &mut States, range: Range, to: State) -> u64 {
        if states.watched {
            states.count_for_watches(range, to);
        }
        let changed = states.map.set(range, to);
        if changed > 0 {
            self.changed(states, range);
        }
        changed
    }

    /// Counts a change that was undone as a change of the range: with one view, the accessed state of a fault from in
    /// between may be the one that was undone, and such a fault is spurious.
    pub(super) fn disturb(&self, range: Range) {
        let states = &mut *self.lock();
        states.map.disturb(range);
        states.undone += 1;
        self.changed(states, range);
    }

    #[inline]
    fn changed(&self, states: &mut States, range: Range) {
        let generation = states.map.generation();
        states.recent[generation as usize % REMEMBERED] = range;
        // Release: KVM enforces the change already when a vCPU reads this generation.
        self.generation.store(generation, Ordering::Release);
    }
}

impl States {
    pub(super) fn map(&self) -> &AttributeMap {
        &self.map
    }

    /// How many changes there were, without those that were undone.
    pub(super) fn changes(&self) -> u64 {
        self.map.generation() - self.undone
    }

    #[inline]
    pub(super) fn see(&self, range: Range) -> Seen {
        let state = self.map.uniform(range);
        Seen {
            range,
            state,
            generation: self.map.generation(),
            mixed: match state {
                Some(_) => None,
                None => Some(Box::new(self.map.snapshot())),
            },
        }
    }

    /// The runs of a range, ascending; neighbouring runs have different states.
    pub(super) fn runs_in(&self, range: Range) -> Vec<Run> {
        self.map.runs_in(range).collect()
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        self.map.snapshot()
    }

    /// Private bytes of a range.
    pub(super) fn private_in(&self, range: Range) -> u64 {
        let private = self.map.runs_in(range).filter(|run| run.state == State::Private);
        private.map(|run| run.range.size()).sum()
    }

    /// Whether a page of `range` changed after `generation`. Exact for the last 64 changes; before those it is also
    /// true if only another page of the same 2 MiB block changed.
    pub(super) fn changed_since(&self, range: Range, generation: u64) -> bool {
        let now = self.map.generation();
        if now == generation {
            return false;
        }
        if now - generation <= REMEMBERED as u64 {
            let mut later = (generation + 1..=now).map(|change| self.recent[change as usize % REMEMBERED]);
            return later.any(|changed| changed.overlaps(&range));
        }
        let blocks = (range.gpa() / BLOCK * BLOCK..range.end()).step_by(BLOCK as usize);
        blocks
            .map(|block| block.max(range.gpa()))
            .any(|gpa| self.map.changed_since(gpa, generation))
    }

    /// How often the page at `gpa` changed since this vCPU began to watch it. Starts to watch it if it watched another.
    pub(super) fn watch(&mut self, vcpu: u32, gpa: u64) -> u64 {
        let Some(watch) = self.watches.get_mut(vcpu as usize) else {
            return 0;
        };
        if watch.gpa != gpa {
            *watch = Watch { gpa, changes: 0 };
        }
        self.watched = true;
        watch.changes
    }

    #[inline(never)]
    fn count_for_watches(&mut self, range: Range, to: State) {
        for watch in &mut self.watches {
            let changes = range.contains(watch.gpa) && self.map.state(watch.gpa) != to;
            watch.changes += u64::from(changes);
        }
    }

    /// Reserves `bytes` that are to become shared, if no more than `max` bytes are shared then, reservations included.
    pub(super) fn reserve(&mut self, bytes: u64, max: u64) -> bool {
        let shared = self.memory - self.map.private_bytes();
        let fits = shared.saturating_add(self.reserved).saturating_add(bytes) <= max;
        if fits {
            self.reserved += bytes;
        }
        fits
    }

    /// Takes `bytes` off the reservation: they are shared now, or will not become shared.
    pub(super) fn release(&mut self, bytes: u64) {
        self.reserved -= bytes;
    }
}

#[cfg(test)]
mod tests;
