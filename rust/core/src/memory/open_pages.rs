//! Which pages are open to vCPUs without paging, see `unpaged.rs`.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::address::Range;

/// The most ranges that are open at a time; the oldest is closed for a further one.
const BOUND: usize = 256;

/// The ranges that are open.
#[derive(Default)]
pub(super) struct OpenPages {
    open: Mutex<VecDeque<Open>>,
    /// Those that were closed, until their vCPU takes note of it.
    closed: Mutex<Vec<Open>>,
    /// Whether there is one. Every conversion reads it without the mutex.
    any: AtomicBool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Open {
    pub range: Range,
    /// For which it was opened.
    pub vcpu: u32,
}

impl OpenPages {
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::SeqCst)
    }

    /// The first of these.
    pub(super) fn find(&self, wanted: impl Fn(&Open) -> bool) -> Option<Open> {
        self.open.lock().iter().find(|open| wanted(open)).copied()
    }

    /// Whether the shared view of all these pages is open.
    pub(super) fn covers(&self, pages: Range) -> bool {
        let all = |open: &Open| open.range.gpa() <= pages.gpa() && pages.end() <= open.range.end();
        !self.is_empty() && self.find(all).is_some()
    }

    pub(super) fn add(&self, open: Open) {
        self.open.lock().push_back(open);
        self.any.store(true, Ordering::SeqCst);
    }

    /// Takes out those of a vCPU that were closed.
    pub(super) fn take_closed(&self, vcpu: u32) -> Vec<Range> {
        let mut closed = self.closed.lock();
        closed
            .extract_if(.., |open| open.vcpu == vcpu)
            .map(|open| open.range)
            .collect()
    }

    /// Notes that a range was closed. Its vCPU opens no further one before it has taken note.
    pub(super) fn note_closed(&self, closed: Open) {
        self.closed.lock().push(closed);
    }

    pub(super) fn remove(&self, gone: Open) {
        let mut open = self.open.lock();
        open.retain(|one| *one != gone);
        self.any.store(!open.is_empty(), Ordering::SeqCst);
    }

    /// Whether one has to be closed before another is opened.
    pub(super) fn is_full(&self) -> bool {
        self.open.lock().len() >= BOUND
    }
}
