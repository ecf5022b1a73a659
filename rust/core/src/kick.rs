//! Bringing a vCPU out of KVM_RUN, from any thread.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering, fence};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::errno::Errno;
use crate::hypervisor::ExitFlag;
use crate::sys;

/// Kicks one vCPU.
///
/// `immediate_exit` makes the next KVM_RUN return EINTR, the signal makes the present one. The flag is set first: a
/// vCPU that is between looking for work and KVM_RUN then finds it, and one that is inside gets the signal.
#[repr(align(128))]
pub struct Kick {
    flag: Arc<dyn ExitFlag>,
    thread: Mutex<Option<libc::pid_t>>,
    /// Between just before and just after KVM_RUN. Only there a signal is of use; elsewhere it would disturb a hook.
    inside: AtomicBool,
}

impl Kick {
    pub(crate) fn new(flag: Arc<dyn ExitFlag>) -> Self {
        Self {
            flag,
            thread: Mutex::new(None),
            inside: AtomicBool::new(false),
        }
    }

    /// Makes the vCPU leave KVM_RUN, now or as soon as it enters.
    pub fn kick(&self) {
        self.flag.byte().store(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if !self.inside.load(Ordering::SeqCst) {
            return;
        }
        if let Some(thread) = *self.thread.lock() {
            sys::signal_thread(thread, signal_number());
        }
    }

    /// `immediate_exit`, for [`kicked`].
    pub(crate) fn flag(&self) -> &AtomicU8 {
        self.flag.byte()
    }

    /// Makes the coming KVM_RUN complete what is pending and return at once.
    pub(crate) fn complete_only(&self) {
        self.flag.byte().store(1, Ordering::SeqCst);
    }

    /// Runs `run`, which enters KVM_RUN, so that a kick reaches it.
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
        // The thread inherits its maker's mask, and who blocks signals there did not mean this one.
        vmm_sys_util::signal::unblock_signal(signal_number()).map_err(|_| Errno(libc::EINVAL))?;
        *self.thread.lock() = Some(sys::thread_id());
        Ok(Attached(self))
    }
}

/// Whether the vCPU was kicked since it last asked this, which is for its own thread. It must look for what the kicks were
/// about after this, not before; one that is still to come reaches it in KVM_RUN.
#[inline]
pub(crate) fn kicked(flag: &AtomicU8) -> bool {
    let kicked = flag.load(Ordering::Relaxed) != 0;
    if kicked {
        flag.store(0, Ordering::Relaxed);
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
    // Away from the first real-time signals, which libraries like to take.
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
