//! Ending a run: the first reason given is the run's result, and every vCPU is kicked out of KVM_RUN.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::asker::Whereabouts;
use super::kick::Kick;
use crate::error::{Error, Failure};

/// How often the thread that waits for the run checks for Ctrl-C.
pub(crate) const POLL: Duration = Duration::from_millis(25);
/// How often all vCPUs are kicked, so that it is seen whether they have halted for good.
const LOOK: Duration = Duration::from_secs(1);
const ROUNDS: u32 = 2;
/// How often vCPUs that were told to leave are kicked again.
const PATIENCE: Duration = Duration::from_millis(5);

pub(crate) struct Control {
    vcpus: Vec<Arc<Kick>>,
    /// A halted vCPU sleeps in the kernel, and there is no exit.
    sleeps_in_kernel: bool,
    leaving: AtomicBool,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    /// vCPU threads that have not ended.
    active: usize,
    /// vCPUs that have not halted.
    awake: usize,
    /// Those that only another vCPU can wake, of those that were looked at in this round.
    asleep: BTreeSet<u32>,
    /// Rounds in a row in which it was so of all. One is not enough: a vCPU may wake another after that was looked at,
    /// and then halt.
    rounds: u32,
    end: Option<Result<String, Error>>,
    /// Where the vCPU was that ended the run.
    at: Option<Whereabouts>,
}

impl Control {
    pub(crate) fn new(vcpus: Vec<Arc<Kick>>, sleeps_in_kernel: bool) -> Self {
        let inner = Inner {
            active: vcpus.len(),
            awake: vcpus.len(),
            asleep: BTreeSet::new(),
            rounds: 0,
            end: None,
            at: None,
        };
        Self {
            vcpus,
            sleeps_in_kernel,
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

    /// Ends the run because of what a vCPU did.
    pub(crate) fn finish_at(&self, reason: String, at: Option<Whereabouts>) {
        let mut inner = self.inner.lock();
        if inner.end.is_none() {
            inner.at = at;
        }
        drop(inner);
        self.finish(Ok(reason));
    }

    pub(crate) fn take_whereabouts(&self) -> Option<Whereabouts> {
        self.inner.lock().at.take()
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

    /// Begins a round, in which every vCPU is kicked and looked at.
    fn look(&self) {
        let mut inner = self.inner.lock();
        let all = inner.asleep.len() == self.vcpus.len();
        inner.rounds = if all { inner.rounds + 1 } else { 0 };
        let over = inner.rounds == ROUNDS;
        inner.asleep.clear();
        drop(inner);
        match over {
            true => self.stop("halt"),
            false => self.kick(),
        }
    }

    /// Only another vCPU can wake this one. If that stays so of all, the run ends.
    pub(crate) fn asleep(&self, vcpu: u32) {
        self.inner.lock().asleep.insert(vcpu);
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
        let mut looked = Instant::now();
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
            match self.leaving() {
                true => self.kick(),
                false if self.sleeps_in_kernel && now - looked >= LOOK => {
                    looked = now;
                    self.look();
                }
                false => self.vcpus.iter().for_each(|vcpu| vcpu.nudge()),
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
