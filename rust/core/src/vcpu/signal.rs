//! The signal that brings a vCPU's thread out of KVM_RUN, and its handler, which does nothing.
//!
//! The handler is there only while a machine runs, and then what there was before is put back. That is safe when the
//! vCPUs' threads have been joined: the signal is only sent to those, and one that a thread had not taken yet
//! ends with it. Earlier it would not be: the signal's default is to end the process.

use std::sync::atomic::{AtomicI32, Ordering};

use parking_lot::Mutex;
use vmm_sys_util::signal::{SIGRTMAX, SIGRTMIN};

use crate::errno::{EBUSY, Errno};
use crate::error::Error;
use crate::hypervisor::raw::{self, Disposition};

/// The runs in progress, and what the process did with the signal before the first of them.
static RUNS: Mutex<Option<(usize, Disposition)>> = Mutex::new(None);
/// Their signal.
static NUMBER: AtomicI32 = AtomicI32::new(0);

/// The signal of the runs in progress.
pub(super) fn number() -> libc::c_int {
    NUMBER.load(Ordering::Relaxed)
}

/// The calling thread, for [`send`].
pub fn this_thread() -> libc::pid_t {
    raw::thread_id()
}

/// Sends it to a thread of this process. Returns whether it was sent: too many may be waiting to be taken.
pub fn send(thread: libc::pid_t) -> bool {
    raw::signal_thread(thread, number())
}

/// Has the calling thread take the signal: it inherits the mask of the thread that created it, which may block it.
///
/// # Errors
/// EINVAL, which cannot be while it is [`Installed`].
pub fn unblock() -> Result<(), Errno> {
    vmm_sys_util::signal::unblock_signal(number()).map_err(|_| Errno(libc::EINVAL))
}

extern "C" fn do_nothing(_: libc::c_int) {}

/// One run's share in the signal's handler. No vCPU thread may outlive it.
pub struct Installed(());

impl Installed {
    /// Installs it, on a signal that nobody handles.
    ///
    /// # Errors
    /// EBUSY if all real-time signals are handled, or somebody else has replaced it since another run began.
    pub fn install() -> Result<Self, Error> {
        let failed = |what| move |errno| Error::Host { what, errno };
        let mut runs = RUNS.lock();
        if let Some((count, _)) = runs.as_mut() {
            let present =
                Disposition::of(number()).map_err(failed("look at the handler of the signal that stops vCPUs"))?;
            if !present.calls(do_nothing) {
                let what =
                    "stop vCPUs: somebody else has replaced the handler of their signal while another machine runs";
                return Err(failed(what)(Errno(EBUSY)));
            }
            *count += 1;
            return Ok(Self(()));
        }
        let (signal, before) = free().ok_or_else(|| {
            let what = "stop vCPUs: each real-time signal from SIGRTMIN+9 on has a handler of somebody else's";
            failed(what)(Errno(EBUSY))
        })?;
        let ours = Disposition::calling(do_nothing);
        ours.set(signal)
            .map_err(failed("install the signal handler that stops vCPUs"))?;
        NUMBER.store(signal, Ordering::Relaxed);
        *runs = Some((1, before));
        Ok(Self(()))
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        let mut runs = RUNS.lock();
        let Some((count, before)) = runs.as_mut() else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            // What somebody else has put there meanwhile stays.
            if Disposition::of(number()).is_ok_and(|present| present.calls(do_nothing)) {
                // It was set before, so it can be set.
                let _ = before.set(number());
            }
            *runs = None;
        }
    }
}

/// A real-time signal that nobody handles, not one of the first, which libraries often use; and what the process does with it.
fn free() -> Option<(libc::c_int, Disposition)> {
    (SIGRTMIN() + 9..=SIGRTMAX()).find_map(|signal| {
        let present = Disposition::of(signal).ok()?;
        present.calls_nothing().then_some((signal, present))
    })
}
