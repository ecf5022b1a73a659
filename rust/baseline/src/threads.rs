//! The vCPUs' threads: waiting for their end, and making KVM_RUN return in them.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::signal;

pub(crate) struct Threads {
    /// Set once: all vCPUs are to end.
    pub leave: AtomicBool,
    inner: Mutex<Inner>,
    ended: Condvar,
}

struct Inner {
    /// How many have not ended, including those that have not started yet.
    left: usize,
    /// The threads that are in their loop.
    running: Vec<libc::pthread_t>,
}

impl Threads {
    pub(crate) fn new(count: usize) -> io::Result<Self> {
        // Without SA_RESTART, so that KVM_RUN returns.
        signal::register_signal_handler(signal_number(), do_nothing)?;
        Ok(Self {
            leave: AtomicBool::new(false),
            inner: Mutex::new(Inner {
                left: count,
                running: Vec::new(),
            }),
            ended: Condvar::new(),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calling thread is in its loop until the guard is dropped.
    pub(crate) fn enter(&self) -> Running<'_> {
        // SAFETY: takes no argument and cannot fail.
        let thread = unsafe { libc::pthread_self() };
        self.inner().running.push(thread);
        Running { threads: self, thread }
    }

    /// Waits until all have ended, but no longer than `time`. Returns whether they have.
    pub(crate) fn wait(&self, time: Duration) -> bool {
        let waited = self
            .ended
            .wait_timeout_while(self.inner(), time, |inner| inner.left > 0);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        inner.left == 0
    }

    /// Makes KVM_RUN return in the threads that are in it. A signal that comes just before KVM_RUN is lost: kick again.
    pub(crate) fn kick(&self) {
        for thread in &self.inner().running {
            // SAFETY: the thread exists: the list is locked, and a thread removes itself from it before it ends.
            unsafe { libc::pthread_kill(*thread, signal_number()) };
        }
    }
}

/// A thread that is in its loop.
pub(crate) struct Running<'a> {
    threads: &'a Threads,
    thread: libc::pthread_t,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.threads.leave.store(true, Ordering::SeqCst);
        }
        let mut inner = self.threads.inner();
        inner.running.retain(|thread| *thread != self.thread);
        inner.left -= 1;
        drop(inner);
        self.threads.ended.notify_all();
    }
}

fn signal_number() -> libc::c_int {
    signal::SIGRTMIN() + 10
}

extern "C" fn do_nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
