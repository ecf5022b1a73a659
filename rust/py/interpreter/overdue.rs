//! Calls of hooks, handlers and listeners that take longer than `policy_timeout`: an exception is raised in them.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::os::raw::{c_long, c_ulong};
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyo3::ffi;
use pyo3::prelude::*;

use super::errors;

/// The calls of one machine's vCPU threads.
pub(crate) struct Overdue {
    limit: Duration,
    threads: Mutex<Vec<Watched>>,
}

struct Watched {
    calls: Arc<Calls>,
    /// The call that was seen in progress: the count, and when that was first.
    seen: Option<(u64, Instant)>,
}

/// One thread's calls.
struct Calls {
    /// Counts their beginnings and their ends, so it is odd while there is one.
    count: AtomicU64,
    /// An exception waits for the thread to execute Python code. Locked while a call ends, and while an exception is
    /// raised in one: without the GIL both may happen at once.
    raised: Mutex<bool>,
    /// The thread, as `threading.get_ident` has it. PyO3 declares CPython's unsigned long as a signed one.
    thread: c_long,
}

impl Calls {
    fn raised(&self) -> MutexGuard<'_, bool> {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many threads are watched. Every call looks at it, and at its thread's own calls only if there are any: a thread-local
/// costs a call itself.
static WATCHED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Those of this thread; null if they have no limit.
    static CALLS: Cell<*const Calls> = const { Cell::new(ptr::null()) };
}

impl Overdue {
    pub(crate) fn new(limit: Duration) -> Self {
        Self {
            limit,
            threads: Mutex::default(),
        }
    }

    fn threads(&self) -> MutexGuard<'_, Vec<Watched>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches the calling thread until the guard is dropped.
    pub(super) fn watch(&self, py: Python<'_>) -> PyResult<Watching<'_>> {
        let thread: c_ulong = py.import("threading")?.call_method0("get_ident")?.extract()?;
        let calls = Arc::new(Calls {
            count: AtomicU64::new(0),
            raised: Mutex::new(false),
            thread: thread as c_long,
        });
        CALLS.set(Arc::as_ptr(&calls));
        WATCHED.fetch_add(1, Ordering::SeqCst);
        self.threads().push(Watched {
            calls: calls.clone(),
            seen: None,
        });
        Ok(Watching { overdue: self, calls })
    }

    /// Raises the exception in the calls that have taken too long. To be called more often than the limit is long.
    pub(crate) fn look(&self, py: Python<'_>) -> PyResult<()> {
        let class = errors::policy_timeout(py)?;
        let now = Instant::now();
        for Watched { calls, seen } in self.threads().iter_mut() {
            let count = calls.count.load(Ordering::SeqCst);
            let since = seen
                .filter(|(known, _)| *known == count)
                .map_or(now, |(_, since)| since);
            let late = now - since >= self.limit;
            // Once more after the same time, if the call catches it.
            *seen = (count % 2 == 1).then_some((count, if late { now } else { since }));
            if seen.is_some() && late {
                let mut raised = calls.raised();
                if calls.count.load(Ordering::SeqCst) == count {
                    *raised = true;
                    // SAFETY: this thread is attached. The other cannot end its call, and itself, before the lock is free.
                    unsafe { ffi::PyThreadState_SetAsyncExc(calls.thread, class.as_ptr()) };
                }
            }
        }
        Ok(())
    }
}

/// Ends the watch when dropped.
pub(super) struct Watching<'a> {
    overdue: &'a Overdue,
    calls: Arc<Calls>,
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        WATCHED.fetch_sub(1, Ordering::SeqCst);
        CALLS.set(ptr::null());
        let ours = |watched: &Watched| Arc::ptr_eq(&watched.calls, &self.calls);
        self.overdue.threads().retain(|watched| !ours(watched));
    }
}

/// Whether the exception has been raised in the calling thread's call, which has not executed Python code since.
pub(crate) fn is_raised() -> bool {
    // SAFETY: as in `begin`.
    let calls = unsafe { CALLS.get().as_ref() };
    calls.is_some_and(|calls| *calls.raised())
}

/// The call that the calling thread makes, until it is dropped. One inside of another counts as part of that.
pub(super) struct Call<'py> {
    calls: *const Calls,
    _attached: Python<'py>,
}

#[inline]
pub(super) fn call(py: Python<'_>) -> Call<'_> {
    let calls = match WATCHED.load(Ordering::Relaxed) {
        0 => ptr::null(),
        _ => begin(),
    };
    Call { calls, _attached: py }
}

impl Drop for Call<'_> {
    #[inline]
    fn drop(&mut self) {
        if !self.calls.is_null() {
            end(self.calls);
        }
    }
}

/// This thread's calls, if they are watched and this is the outermost; else null.
#[cold]
fn begin() -> *const Calls {
    let watched = CALLS.get();
    // SAFETY: it is null, or `Watching` of this thread keeps it alive until no call is made, and clears `CALLS` before.
    let calls = unsafe { watched.as_ref() };
    let outermost = calls.filter(|calls| calls.count.load(Ordering::Relaxed).is_multiple_of(2));
    outermost.map_or(ptr::null(), |calls| {
        calls.count.fetch_add(1, Ordering::SeqCst);
        watched
    })
}

#[cold]
fn end(calls: *const Calls) {
    // SAFETY: as in `begin`.
    let calls = unsafe { &*calls };
    let mut raised = calls.raised();
    calls.count.fetch_add(1, Ordering::SeqCst);
    if std::mem::take(&mut *raised) {
        // The call may have ended without executing Python code; the next one is not to get its exception.
        // SAFETY: the thread is attached: `Call` has a token.
        unsafe { ffi::PyThreadState_SetAsyncExc(calls.thread, ptr::null_mut()) };
    }
}
