//! Bringing a vCPU out of KVM_RUN, from any thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering, fence};

use parking_lot::Mutex;

use super::signal;
use crate::errno::Errno;
use crate::hypervisor::vm::ImmediateExit;

/// Kicks one vCPU.
///
/// Setting `immediate_exit` makes the next KVM_RUN return EINTR; the signal interrupts one that is in progress. The
/// byte is set first, so that a vCPU which has tested the stop flag but not entered KVM_RUN yet does not miss the kick.
pub struct Kick {
    immediate_exit: Arc<dyn ImmediateExit>,
    thread: Mutex<Option<libc::pid_t>>,
    /// Set from just before KVM_RUN to just after it: a signal at any other time would interrupt a hook's system calls.
    inside: AtomicBool,
    /// How often it was kicked since it went into KVM_RUN.
    times: AtomicU32,
    /// The vCPU wants to leave KVM_RUN from time to time.
    nudged: AtomicBool,
}

impl Kick {
    pub(crate) fn new(immediate_exit: Arc<dyn ImmediateExit>) -> Self {
        Self {
            immediate_exit,
            thread: Mutex::new(None),
            inside: AtomicBool::new(false),
            times: AtomicU32::new(0),
            nudged: AtomicBool::new(false),
        }
    }

    /// Makes the vCPU leave KVM_RUN, now or as soon as it enters.
    ///
    /// It may be kicked again and again while the kernel does not let it go. Each real-time signal waits in a queue that all
    /// of the user's processes share, so only the first few kicks of one stay send it, and then ever fewer.
    pub fn kick(&self) {
        if self.set_immediate_exit()
            && let Some(thread) = *self.thread.lock()
            && sends(self.times.fetch_add(1, Ordering::Relaxed))
            && !signal::send(thread)
        {
            // The queue is full; the next kick tries it again.
            self.times.store(0, Ordering::Relaxed);
        }
    }

    /// Returns whether the vCPU may be in KVM_RUN already, which only the signal ends.
    fn set_immediate_exit(&self) -> bool {
        self.immediate_exit.byte().store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.inside.load(Ordering::SeqCst)
    }

    /// Says whether [`nudge`](Self::nudge) is to kick this vCPU.
    pub(crate) fn set_nudged(&self, wanted: bool) {
        self.nudged.store(wanted, Ordering::SeqCst);
    }

    /// Kicks the vCPU if it wants to be.
    pub(crate) fn nudge(&self) {
        if self.nudged.load(Ordering::SeqCst) {
            self.kick();
        }
    }

    /// The byte in kvm_run, for [`kicked`].
    pub(crate) fn immediate_exit(&self) -> &AtomicU8 {
        self.immediate_exit.byte()
    }

    /// Makes the next KVM_RUN take the answer to the last exit and return without entering the guest.
    pub(crate) fn complete_only(&self) {
        self.immediate_exit.byte().store(1, Ordering::SeqCst);
    }

    /// Calls `run`, which enters KVM_RUN. A kick during it sends the signal.
    #[inline]
    pub(crate) fn inside<T>(&self, run: impl FnOnce() -> T) -> T {
        self.times.store(0, Ordering::Relaxed);
        self.inside.store(true, Ordering::SeqCst);
        let result = run();
        self.inside.store(false, Ordering::Relaxed);
        result
    }

    /// Whether the vCPU is in KVM_RUN, or nearly.
    pub(crate) fn is_inside(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }

    /// Whether this thread runs the vCPU.
    pub(crate) fn is_run_by(&self, thread: libc::pid_t) -> bool {
        *self.thread.lock() == Some(thread)
    }

    /// The calling thread runs this vCPU until the guard drops. The signal is [`Installed`](signal::Installed)
    /// meanwhile.
    pub(crate) fn attach(&self) -> Result<Attached<'_>, Errno> {
        signal::unblock()?;
        *self.thread.lock() = Some(signal::this_thread());
        Ok(Attached(self))
    }
}

/// Clears immediate_exit, and returns whether it was set. The vCPU's thread calls this first and tests the stop flag
/// after it: a kick that comes later sets the byte again, so the next KVM_RUN returns.
#[inline]
pub(crate) fn kicked(immediate_exit: &AtomicU8) -> bool {
    let kicked = immediate_exit.load(Ordering::Relaxed) != 0;
    if kicked {
        immediate_exit.store(0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
    kicked
}

/// Whether the kick after so many others sends the signal.
fn sends(before: u32) -> bool {
    before < 8 || before.is_power_of_two()
}

pub(crate) struct Attached<'a>(&'a Kick);

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        *self.0.thread.lock() = None;
    }
}

#[cfg(test)]
mod tests;
