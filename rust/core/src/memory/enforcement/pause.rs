//! Keeping every vCPU out of the guest while memslots change under `enforcement="memslots"`.
//!
//! A memslot is split by deleting it first, and to KVM a page without a slot is MMIO: an atomic instruction would be
//! emulated in two halves, and a page-table walk would end in a triple fault.

use std::sync::OnceLock;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// How often vCPUs that are still in the guest are kicked again.
const PATIENCE: Duration = Duration::from_millis(5);

/// Brings every vCPU out of KVM_RUN.
pub(crate) type KickAll = Box<dyn Fn() + Send + Sync>;

/// Counts the vCPUs in the guest, and holds them out of it.
#[derive(Default)]
pub(crate) struct Pause {
    counts: Mutex<Counts>,
    changed: Condvar,
    kick_all: OnceLock<KickAll>,
}

#[derive(Default)]
struct Counts {
    in_guest: usize,
    pausers: usize,
}

impl Pause {
    /// Set once there are vCPUs; before, none can be in the guest.
    pub(crate) fn set_kick_all(&self, kick_all: KickAll) {
        // Only the first one counts, and a machine sets it once.
        let _ = self.kick_all.set(kick_all);
    }

    /// A vCPU enters the guest, as soon as nobody holds it out.
    pub(crate) fn enter(&self) -> InGuest<'_> {
        let mut counts = self.counts.lock();
        while counts.pausers > 0 {
            self.changed.wait(&mut counts);
        }
        counts.in_guest += 1;
        InGuest(self)
    }

    /// Waits until every vCPU is out of the guest, and keeps them there until the guard drops.
    pub(super) fn pause(&self) -> Paused<'_> {
        let mut counts = self.counts.lock();
        counts.pausers += 1;
        while counts.in_guest > 0 {
            if let Some(kick_all) = self.kick_all.get() {
                kick_all();
            }
            self.changed.wait_for(&mut counts, PATIENCE);
        }
        drop(counts);
        Paused(self)
    }
}

pub(crate) struct InGuest<'a>(&'a Pause);

impl Drop for InGuest<'_> {
    fn drop(&mut self) {
        let mut counts = self.0.counts.lock();
        counts.in_guest -= 1;
        if counts.pausers > 0 {
            self.0.changed.notify_all();
        }
    }
}

pub(super) struct Paused<'a>(&'a Pause);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        let mut counts = self.0.counts.lock();
        counts.pausers -= 1;
        self.0.changed.notify_all();
    }
}
