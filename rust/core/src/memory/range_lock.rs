//! Locks on ranges of guest memory: disjoint ranges at once, overlapping ones in the order they came.
//!
//! What is known about the memory lies under the same mutex, so that who comes for a range learns of it, and who lets go
//! of it changes that, without taking another.

use std::mem::ManuallyDrop;

use parking_lot::{Condvar, MappedMutexGuard, Mutex, MutexGuard};

use super::address::Range;

pub(crate) struct RangeLocks<T> {
    inner: Mutex<Inner<T>>,
    freed: Condvar,
}

struct Inner<T> {
    queue: Queue,
    data: T,
}

#[derive(Default)]
struct Queue {
    next: u64,
    waiting: usize,
    /// One entry a holder or waiter, so as many as there are threads.
    entries: Vec<(u64, Range)>,
}

impl Queue {
    /// An earlier overlapping entry holds or will hold it; waiting for those too is what keeps a large range from
    /// being starved by small ones.
    fn blocked(&self, ticket: u64, range: Range) -> bool {
        self.entries
            .iter()
            .any(|(earlier, held)| *earlier < ticket && held.overlaps(&range))
    }

    #[inline]
    fn leave(&mut self, ticket: u64) {
        match self.entries[..] {
            // As a rule nobody else is about.
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

    /// The data, for a moment, whoever holds what.
    #[inline]
    pub(crate) fn data(&self) -> MappedMutexGuard<'_, T> {
        MutexGuard::map(self.inner.lock(), |inner| &mut inner.data)
    }

    /// Waits until nobody holds a part of `range`, and holds it. A thread that holds one must not ask for another.
    pub(crate) fn lock(&self, range: Range) -> RangeGuard<'_, T> {
        self.lock_and_look(range).0
    }

    /// The same, and the data as it is from then on, for a moment.
    #[inline(always)]
    pub(crate) fn lock_and_look(&self, range: Range) -> (RangeGuard<'_, T>, MappedMutexGuard<'_, T>) {
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

    /// Waits in turn until nobody holds a part of `range`, and does not hold it: the data as it is then, for a moment.
    #[inline]
    pub(crate) fn look_when_free(&self, range: Range) -> MappedMutexGuard<'_, T> {
        let inner = self.inner.lock();
        match inner.queue.entries.is_empty() {
            true => MutexGuard::map(inner, |inner| &mut inner.data),
            false => {
                drop(inner);
                self.lock(range).finish()
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

pub(crate) struct RangeGuard<'a, T> {
    locks: &'a RangeLocks<T>,
    ticket: u64,
}

impl<'a, T> RangeGuard<'a, T> {
    /// Lets go of the range, and of what was known of it: that can be changed as long as nobody else sees either.
    #[inline(always)]
    pub(crate) fn finish(self) -> MappedMutexGuard<'a, T> {
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
