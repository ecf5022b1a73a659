//! Locks on ranges of guest memory. Disjoint ranges can be held at the same time; overlapping ones are given out in the
//! order in which they were asked for.
//!
//! The mutex of the queue protects the data about that memory, too. So taking a range and reading the data, or changing
//! the data and giving the range back, take one mutex and not two.

use std::mem::ManuallyDrop;

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
    /// The ticket and the range of each thread that holds a range or waits for one.
    entries: Vec<(u64, Range)>,
}

impl Queue {
    /// Whether an earlier entry overlaps, whether it holds its range or waits for it. Waiting for the waiting ones,
    /// too, keeps a large range from being starved by small ones.
    fn blocked(&self, ticket: u64, range: Range) -> bool {
        self.entries
            .iter()
            .any(|(earlier, held)| *earlier < ticket && held.overlaps(&range))
    }

    #[inline]
    fn leave(&mut self, ticket: u64) {
        match self.entries[..] {
            // The usual case: this is the only entry.
            [_] => self.entries.clear(),
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
        let ticket = inner.queue.next;
        inner.queue.next += 1;
        let alone = inner.queue.entries.is_empty();
        inner.queue.entries.push((ticket, range));
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

    #[cold]
    fn wait(&self, inner: &mut MutexGuard<'_, Inner<T>>, ticket: u64, range: Range) {
        while inner.queue.blocked(ticket, range) {
            inner.queue.waiting += 1;
            self.freed.wait(inner);
            inner.queue.waiting -= 1;
        }
    }
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
