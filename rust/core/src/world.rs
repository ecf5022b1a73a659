//! Holding every vCPU out of the guest while memslots change under `enforcement="memslots"`.
//!
//! A slot is split by deleting it first, and a page without a slot is MMIO to KVM: an atomic instruction would be
//! emulated in two halves and a page-table walk would end in a triple fault.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::kick::Kick;

/// How often vCPUs that are still inside are kicked again.
const PATIENCE: Duration = Duration::from_millis(5);

#[derive(Default)]
pub(crate) struct World {
    inner: Mutex<Inside>,
    changed: Condvar,
}

#[derive(Default)]
struct Inside {
    running: usize,
    pausers: usize,
}

impl World {
    /// A vCPU enters the guest, as soon as nobody needs it outside.
    pub(crate) fn enter(&self) -> Entered<'_> {
        let mut inside = self.inner.lock();
        while inside.pausers > 0 {
            self.changed.wait(&mut inside);
        }
        inside.running += 1;
        Entered(self)
    }

    /// Waits until every vCPU is outside, and keeps them there until the guard drops.
    pub(crate) fn pause(&self, vcpus: &[Arc<Kick>]) -> Paused<'_> {
        let mut inside = self.inner.lock();
        inside.pausers += 1;
        while inside.running > 0 {
            for vcpu in vcpus {
                vcpu.kick();
            }
            self.changed.wait_for(&mut inside, PATIENCE);
        }
        drop(inside);
        Paused(self)
    }
}

pub(crate) struct Entered<'a>(&'a World);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut inside = self.0.inner.lock();
        inside.running -= 1;
        if inside.pausers > 0 {
            self.0.changed.notify_all();
        }
    }
}

pub(crate) struct Paused<'a>(&'a World);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        let mut inside = self.0.inner.lock();
        inside.pausers -= 1;
        self.0.changed.notify_all();
    }
}
