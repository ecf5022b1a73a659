//! Locks on ranges of guest memory. Disjoint ranges can be held at the same time; overlapping ones are given out in the
//! order in which they were asked for.
//!
//! The mutex of the queue protects the data about that memory, too. So taking a range and reading the data, or changing
//! the data and giving the range back, take one mutex and not two.

use std::mem::ManuallyDrop;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, MappedMutexGuard, Mutex, MutexGuard};

use super::address::Range;

pub(crate) struct RangeLocks<T> {
    inner: Mutex<Inner<T>>,
    freed: Condvar,
}

/// What the mutex protects.
struct Inner<T> {
    queue: Queue,
    data: T,
}

#[derive(Default)]
struct Queue {
    /// The next ticket: they are given out in ascending order.
    next: u64,
    /// How many threads sleep.
    waiting: usize,
    /// The ticket and the range of each thread that holds a range or waits for one; several for one that wants several.
    entries: Vec<(u64, Range)>,
}

impl Queue {
    /// Enters these ranges, behind all others. Returns their ticket.
    #[inline(always)]
    fn enter(&mut self, ranges: &[Range]) -> u64 {
        let ticket = self.next;
        self.next += 1;
        // For the usual one no more than this.
        for range in ranges {
            self.entries.push((ticket, *range));
        }
        ticket
    }

    /// Whether an earlier entry overlaps, whether it holds its range or waits for it. Waiting for the waiting ones,
    /// too, keeps a large range from being starved by small ones.
    fn blocked(&self, ticket: u64, range: Range) -> bool {
        self.entries
            .iter()
            .any(|(earlier, held)| *earlier < ticket && held.overlaps(&range))
    }

    /// Whether one overlaps any of `ranges`, which are [`merged`].
    fn any_blocked(&self, ticket: u64, ranges: &[Range]) -> bool {
        self.entries.iter().any(|(earlier, held)| {
            let first = ranges.partition_point(|range| range.end() <= held.gpa());
            *earlier < ticket && ranges.get(first).is_some_and(|range| range.overlaps(held))
        })
    }

    #[inline]
    fn leave(&mut self, ticket: u64) {
        match self.entries[..] {
            // The usual case: this is the only entry. A guard of no range at all has none, so it may be another's.
            [(only, _)] if only == ticket => self.entries.clear(),
            _ => self.entries.retain(|(other, _)| *other != ticket),
        }
    }
}

impl<T> RangeLocks<T> {
    pub(crate) fn new(data: T) -> Self {
        let queue = Queue::default();
        Self {
            inner: Mutex::new(Inner { queue, data }),
            freed: Condvar::new(),
        }
    }

    /// The data, for a moment, also while ranges are held.
    #[inline]
    pub(crate) fn data(&self) -> MappedMutexGuard<'_, T> {
        MutexGuard::map(self.inner.lock(), |inner| &mut inner.data)
    }

    /// Waits for its turn and holds `range` until the guard is dropped. A thread that holds a range must not ask for
    /// another.
    pub(crate) fn lock(&self, range: Range) -> RangeGuard<'_, T> {
        self.lock_and_access(range).0
    }

    /// The same, and the data, with the mutex still locked.
    #[inline(always)]
    pub(crate) fn lock_and_access(&self, range: Range) -> (RangeGuard<'_, T>, MappedMutexGuard<'_, T>) {
        let mut inner = self.inner.lock();
        let alone = inner.queue.entries.is_empty();
        let ticket = inner.queue.enter(&[range]);
        if !alone {
            self.wait(&mut inner, ticket, range);
        }
        let guard = RangeGuard { locks: self, ticket };
        (guard, MutexGuard::map(inner, |inner| &mut inner.data))
    }

    /// Waits for its turn, as [`lock`](Self::lock) does, and returns the data at that moment, without holding `range`.
    #[inline]
    pub(crate) fn access_when_free(&self, range: Range) -> MappedMutexGuard<'_, T> {
        let inner = self.inner.lock();
        match inner.queue.entries.is_empty() {
            true => MutexGuard::map(inner, |inner| &mut inner.data),
            false => {
                drop(inner);
                self.lock(range).release()
            }
        }
    }

    /// The same for several ranges, which it holds together. That they have one ticket keeps two threads from waiting for
    /// each other.
    pub(crate) fn lock_all_and_access(&self, ranges: &[Range]) -> (RangeGuard<'_, T>, MappedMutexGuard<'_, T>) {
        let ranges = merged(ranges);
        let mut inner = self.inner.lock();
        let ticket = inner.queue.enter(&ranges);
        while inner.queue.any_blocked(ticket, &ranges) {
            self.sleep(&mut inner);
        }
        let guard = RangeGuard { locks: self, ticket };
        (guard, MutexGuard::map(inner, |inner| &mut inner.data))
    }

    /// Waits as [`lock`](Self::lock) does, but asks each `time` whether to go on; `None` if not. Asks first of all, too.
    pub(crate) fn lock_while(
        &self,
        range: Range,
        time: Duration,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Option<RangeGuard<'_, T>> {
        if !go_on() {
            return None;
        }
        let mut inner = self.inner.lock();
        let ticket = inner.queue.enter(&[range]);
        // From here on it gives its place back when it is dropped.
        let guard = RangeGuard { locks: self, ticket };
        let mut ask = Instant::now() + time;
        while inner.queue.blocked(ticket, range) {
            inner.queue.waiting += 1;
            let late = self.freed.wait_until(&mut inner, ask).timed_out();
            inner.queue.waiting -= 1;
            if late {
                drop(inner);
                if !go_on() {
                    return None;
                }
                ask = Instant::now() + time;
                inner = self.inner.lock();
            }
        }
        drop(inner);
        Some(guard)
    }

    #[cold]
    fn wait(&self, inner: &mut MutexGuard<'_, Inner<T>>, ticket: u64, range: Range) {
        while inner.queue.blocked(ticket, range) {
            self.sleep(inner);
        }
    }

    fn sleep(&self, inner: &mut MutexGuard<'_, Inner<T>>) {
        inner.queue.waiting += 1;
        self.freed.wait(inner);
        inner.queue.waiting -= 1;
    }
}

/// The same pages in ascending ranges that do not touch. A disk's request names many, several requests are under way, and
/// each range is compared with all that are held.
fn merged(ranges: &[Range]) -> Vec<Range> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable_by_key(Range::gpa);
    let mut merged: Vec<Range> = Vec::with_capacity(sorted.len());
    for range in sorted {
        let joined = merged.last().filter(|last| range.gpa() <= last.end());
        let joined = joined.and_then(|last| Range::new(last.gpa(), last.end().max(range.end()) - last.gpa()));
        match joined {
            Some(joined) => {
                merged.pop();
                merged.push(joined);
            }
            None => merged.push(range),
        }
    }
    merged
}

/// Holds a range.
pub(crate) struct RangeGuard<'a, T> {
    locks: &'a RangeLocks<T>,
    ticket: u64,
}

impl<'a, T> RangeGuard<'a, T> {
    /// Gives the range back and returns the data with the mutex still locked. The next holder sees what the caller then
    /// changes.
    #[inline(always)]
    pub(crate) fn release(self) -> MappedMutexGuard<'a, T> {
        ManuallyDrop::new(self).leave()
    }

    #[inline(always)]
    fn leave(&self) -> MappedMutexGuard<'a, T> {
        let mut inner = self.locks.inner.lock();
        inner.queue.leave(self.ticket);
        if inner.queue.waiting > 0 {
            self.locks.freed.notify_all();
        }
        MutexGuard::map(inner, |inner| &mut inner.data)
    }
}

impl<T> Drop for RangeGuard<'_, T> {
    fn drop(&mut self) {
        drop(self.leave());
    }
}

#[cfg(test)]
mod tests;
