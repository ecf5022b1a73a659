//! Locks on ranges of guest memory: disjoint ranges at once, overlapping ones in the order they came.

use parking_lot::{Condvar, Mutex};

use crate::attributes::Range;

#[derive(Default)]
pub(crate) struct RangeLocks {
    queue: Mutex<Queue>,
    freed: Condvar,
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
}

impl RangeLocks {
    /// Waits until nobody holds a part of `range`, and holds it. A thread that holds one must not ask for another.
    pub(crate) fn lock(&self, range: Range) -> RangeGuard<'_> {
        let mut queue = self.queue.lock();
        let ticket = queue.next;
        queue.next += 1;
        queue.entries.push((ticket, range));
        while queue.blocked(ticket, range) {
            queue.waiting += 1;
            self.freed.wait(&mut queue);
            queue.waiting -= 1;
        }
        RangeGuard { locks: self, ticket }
    }
}

pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    ticket: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut queue = self.locks.queue.lock();
        match queue.entries[..] {
            // As a rule nobody else is about.
            [_] => queue.entries.clear(),
            _ => queue.entries.retain(|(ticket, _)| *ticket != self.ticket),
        }
        if queue.waiting > 0 {
            self.locks.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests;
