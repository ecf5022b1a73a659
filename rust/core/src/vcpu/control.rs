//! Ending a run: the first reason given is the run's result, and every vCPU is kicked out of KVM_RUN.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::kick::Kick;
use crate::error::{Error, Failure};

/// How often the thread that waits for the run checks for Ctrl-C.
const POLL: Duration = Duration::from_millis(25);
/// How often vCPUs that were told to leave are kicked again.
const PATIENCE: Duration = Duration::from_millis(5);

pub(crate) struct Control {
    vcpus: Vec<Arc<Kick>>,
    leaving: AtomicBool,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    /// vCPU threads that have not ended.
    active: usize,
    /// vCPUs that have not halted.
    awake: usize,
    end: Option<Result<String, Error>>,
}

impl Control {
    pub(crate) fn new(vcpus: Vec<Arc<Kick>>) -> Self {
        let inner = Inner {
            active: vcpus.len(),
            awake: vcpus.len(),
            end: None,
        };
        Self {
            vcpus,
            leaving: AtomicBool::new(false),
            inner: Mutex::new(inner),
            changed: Condvar::new(),
        }
    }

    /// Ends the run, unless something else already did.
    pub(crate) fn finish(&self, end: Result<String, Error>) {
        let mut inner = self.inner.lock();
        // The first end counts. An interrupt of the caller replaces a regular end: its signal has been consumed
        // already, so it would be lost if it were not returned here.
        let interrupts = matches!(end, Err(Error::Interrupted(_)));
        if inner.end.is_none() || interrupts && matches!(inner.end, Some(Ok(_))) {
            inner.end = Some(end);
        }
        self.leaving.store(true, Ordering::SeqCst);
        self.changed.notify_all();
        drop(inner);
        self.kick();
    }

    pub(crate) fn stop(&self, reason: &str) {
        self.finish(Ok(reason.to_owned()));
    }

    fn kick(&self) {
        for vcpu in &self.vcpus {
            vcpu.kick();
        }
    }

    /// A vCPU executed HLT. With no interrupt controller nothing wakes it, so the last one ends the run.
    pub(crate) fn halted(&self) {
        let mut inner = self.inner.lock();
        inner.awake -= 1;
        if inner.awake == 0 {
            drop(inner);
            self.stop("halt");
        }
    }

    pub(crate) fn leaving(&self) -> bool {
        self.leaving.load(Ordering::SeqCst)
    }

    /// Waits for `time`, or less if the run ends meanwhile.
    pub(crate) fn pause(&self, time: Duration) {
        let mut inner = self.inner.lock();
        if !self.leaving() {
            self.changed.wait_for(&mut inner, time);
        }
    }

    pub(crate) fn thread_ended(&self) {
        self.inner.lock().active -= 1;
        self.changed.notify_all();
    }

    /// Waits until every vCPU thread has ended. `interrupt` is called every 25 ms; an error of it ends the run.
    pub(crate) fn wait(&self, deadline: Option<Instant>, interrupt: &mut dyn FnMut() -> Result<(), Failure>) {
        loop {
            let now = Instant::now();
            if deadline.is_some_and(|deadline| deadline <= now) && !self.leaving() {
                self.stop("timeout");
            }
            let mut inner = self.inner.lock();
            if inner.active == 0 {
                return;
            }
            let patience = if self.leaving() { PATIENCE } else { POLL };
            let left = deadline.map_or(patience, |deadline| deadline.saturating_duration_since(now));
            let left = if self.leaving() { PATIENCE } else { left };
            self.changed.wait_for(&mut inner, patience.min(left));
            drop(inner);
            if self.leaving() {
                self.kick();
            }
            if let Err(failure) = interrupt() {
                self.finish(Err(Error::Interrupted(failure)));
            }
        }
    }

    /// How the run ended. To be called once, after `wait`.
    pub(crate) fn take_end(&self) -> Result<String, Error> {
        let end = self.inner.lock().end.take();
        end.unwrap_or_else(|| Ok("stopped".to_owned()))
    }
}
