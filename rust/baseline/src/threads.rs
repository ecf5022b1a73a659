//! The vCPUs' threads: waiting for their end, and making KVM_RUN return in them.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pagegate_core::error::Error;
use pagegate_core::vcpu::signal::{self, Installed};

pub(crate) struct Threads {
    /// Set once: all vCPUs are to end.
    pub leave: AtomicBool,
    inner: Mutex<Inner>,
    ended: Condvar,
    _signal: Installed,
}

struct Inner {
    /// How many have not ended, including those that have not started yet.
    left: usize,
    /// The threads that are in their loop.
    running: Vec<libc::pid_t>,
}

impl Threads {
    pub(crate) fn new(count: usize) -> io::Result<Self> {
        Ok(Self {
            leave: AtomicBool::new(false),
            inner: Mutex::new(Inner {
                left: count,
                running: Vec::new(),
            }),
            ended: Condvar::new(),
            _signal: Installed::install().map_err(of_host)?,
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calling thread is in its loop until the guard is dropped.
    pub(crate) fn enter(&self) -> io::Result<Running<'_>> {
        let thread = signal::this_thread();
        self.inner().running.push(thread);
        let running = Running { threads: self, thread };
        signal::unblock().map_err(|errno| io::Error::from_raw_os_error(errno.0))?;
        Ok(running)
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
            // It exists: the list is locked, and a thread removes itself from it before it ends.
            let _ = signal::send(*thread);
        }
    }
}

/// A thread that is in its loop.
pub(crate) struct Running<'a> {
    threads: &'a Threads,
    thread: libc::pid_t,
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

fn of_host(error: Error) -> io::Error {
    match error {
        Error::Host { errno, .. } => io::Error::from_raw_os_error(errno.0),
        other => io::Error::other(other.to_string()),
    }
}
