//! Bringing a vCPU out of KVM_RUN, from any thread.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering, fence};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::errno::Errno;
use crate::hypervisor::raw;
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
}

impl Kick {
    pub(crate) fn new(immediate_exit: Arc<dyn ImmediateExit>) -> Self {
        Self {
            immediate_exit,
            thread: Mutex::new(None),
            inside: AtomicBool::new(false),
        }
    }

    /// Makes the vCPU leave KVM_RUN, now or as soon as it enters.
    pub fn kick(&self) {
        self.immediate_exit.byte().store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if !self.inside.load(Ordering::SeqCst) {
            return;
        }
        if let Some(thread) = *self.thread.lock() {
            raw::signal_thread(thread, signal_number());
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
        self.inside.store(true, Ordering::SeqCst);
        let result = run();
        self.inside.store(false, Ordering::Relaxed);
        result
    }

    /// The calling thread runs this vCPU until the guard drops.
    pub(crate) fn attach(&self) -> Result<Attached<'_>, Errno> {
        install_handler()?;
        // The thread inherits the signal mask of the thread that created it, which may block this signal.
        vmm_sys_util::signal::unblock_signal(signal_number()).map_err(|_| Errno(libc::EINVAL))?;
        *self.thread.lock() = Some(raw::thread_id());
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

pub(crate) struct Attached<'a>(&'a Kick);

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        *self.0.thread.lock() = None;
    }
}

fn signal_number() -> libc::c_int {
    // Not one of the first real-time signals, which libraries often use.
    vmm_sys_util::signal::SIGRTMIN() + 9
}

extern "C" fn do_nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn install_handler() -> Result<(), Errno> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            // Without SA_RESTART, so that the ioctl returns EINTR.
            vmm_sys_util::signal::register_signal_handler(signal_number(), do_nothing).map_err(|error| error.errno())
        })
        .map_err(Errno)
}
