//! Keeps every vCPU out of the guest while memslots change under `enforcement="memslots"`.
//!
//! A memslot can only be split by deleting it first, and an access to a page without a memslot is MMIO to KVM: it would
//! emulate an atomic instruction as a load and a store, and a page-table walk would end in a triple fault.

use std::sync::OnceLock;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// After this time, vCPUs that are still in the guest are kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(5);

/// Brings every vCPU out of KVM_RUN.
pub(crate) type KickAll = Box<dyn Fn() + Send + Sync>;

/// Counts the vCPUs in the guest, and keeps them out of it.
#[derive(Default)]
pub(crate) struct Pause {
    counts: Mutex<Counts>,
    changed: Condvar,
    kick_all: OnceLock<KickAll>,
}

#[derive(Default)]
struct Counts {
    in_guest: usize,
    /// Pauses that are wanted or held.
    pauses: usize,
}

impl Pause {
    /// Called once, when the vCPUs have been created. Until then none can be in the guest.
    pub(crate) fn set_kick_all(&self, kick_all: KickAll) {
        // A second call would have no effect, and there is none.
        let _ = self.kick_all.set(kick_all);
    }

    /// Waits until there is no pause. The calling vCPU counts as in the guest until the guard is dropped.
    pub(crate) fn enter(&self) -> InGuest<'_> {
        let mut counts = self.counts.lock();
        while counts.pauses > 0 {
            self.changed.wait(&mut counts);
        }
        counts.in_guest += 1;
        InGuest(self)
    }

    /// Waits until every vCPU is out of the guest, and keeps them out until the guard is dropped.
    pub(super) fn pause(&self) -> Paused<'_> {
        let mut counts = self.counts.lock();
        counts.pauses += 1;
        while counts.in_guest > 0 {
            if let Some(kick_all) = self.kick_all.get() {
                kick_all();
            }
            self.changed.wait_for(&mut counts, KICK_AGAIN);
        }
        drop(counts);
        Paused(self)
    }
}

/// Counts a vCPU as in the guest until it is dropped.
pub(crate) struct InGuest<'a>(&'a Pause);

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        let mut counts = self.0.counts.lock();
        counts.in_guest -= 1;
        if counts.pauses > 0 {
            self.0.changed.notify_all();
        }
    }
}

/// Keeps vCPUs out of the guest until it is dropped.
pub(super) struct Paused<'a>(&'a Pause);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        let mut counts = self.0.counts.lock();
        counts.pauses -= 1;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests;
