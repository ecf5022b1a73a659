//! Whether the machine runs, is about to, or never will again.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::error::Error;
use crate::process::Process;
use crate::vcpu::control::Control;

const RUNNING: &str =
    "this machine is running already: run() cannot be called again until it has returned, nor in a hook";
const STILL: &str = "this machine is being put aside, or resumed: wait until snapshot() or resume() has returned";
const CLOSED: &str = "this machine is closed";
const CLOSE_WHILE_RUNNING: &str = "the machine is running: call stop() and let run() return before close()";

/// A run as those see it who read its events: of the first one there is this before it begins.
#[derive(Default)]
pub struct Watched(OnceLock<u64>);

impl Watched {
    /// The number of the event after its last, once it is over.
    pub fn end(&self) -> Option<u64> {
        self.0.get().copied()
    }
}

/// Whether there is a run. Devices hold it too, so that a guest can end its run.
#[derive(Default)]
pub(super) struct Current {
    now: Mutex<Now>,
    /// The present run or else the last one; before there was any, the first.
    watched: Mutex<Arc<Watched>>,
    process: Process,
}

/// Nobody runs, changes or closes the machine meanwhile.
pub(super) struct Still<'a>(&'a Current);

impl Drop for Still<'_> {
    fn drop(&mut self) {
        *self.0.now.lock() = Now::Idle;
    }
}

#[derive(Default)]
enum Now {
    #[default]
    Idle,
    /// A run was claimed, and what comes before the vCPUs is done: the policy and listeners are told, vCPUs waited for.
    /// The reason why the run is to end, if there is one already.
    Entering(Option<String>),
    Running(Arc<Control>),
    /// It is put aside, or made to go on from a snapshot.
    Still,
    Closed,
}

impl Current {
    /// Ends the run in progress, from any thread, also one that has not begun yet; without one it does nothing. Nor does it
    /// in a child that was forked meanwhile: the run is the parent's.
    pub(super) fn stop(&self, reason: &str) {
        if !self.process.is_present() {
            return;
        }
        let mut now = self.now.lock();
        match &mut *now {
            Now::Entering(end) => {
                end.get_or_insert_with(|| reason.to_owned());
            }
            Now::Running(control) => {
                let control = control.clone();
                drop(now);
                control.stop(reason);
            }
            Now::Idle | Now::Still | Now::Closed => {}
        }
    }

    /// Whether it was made in this process, and not in one that this one was forked from.
    pub(super) fn is_of_this_process(&self) -> bool {
        self.process.is_present()
    }

    /// Whether the vCPUs of the run in progress are to end.
    pub(super) fn ending(&self) -> bool {
        matches!(&*self.now.lock(), Now::Running(control) if control.leaving())
    }

    /// Ends the run in progress with an error; gives it back if no vCPU runs.
    pub(super) fn fail(&self, error: Error) -> Result<(), Error> {
        let now = self.now.lock();
        let Now::Running(control) = &*now else {
            return Err(error);
        };
        let control = control.clone();
        drop(now);
        control.finish(Err(error));
        Ok(())
    }

    pub(super) fn running(&self) -> bool {
        matches!(*self.now.lock(), Now::Entering(_) | Now::Running(_))
    }

    /// A run is claimed. Until [`over`](Self::over) nobody else can claim one, nor close the machine.
    pub(super) fn enter(&self) -> Result<(), Error> {
        let mut now = self.now.lock();
        now.idle()?;
        *now = Now::Entering(None);
        drop(now);
        let mut watched = self.watched.lock();
        if watched.end().is_some() {
            *watched = Arc::default();
        }
        Ok(())
    }

    /// Until what is returned is dropped there is no run, nor can one be claimed.
    pub(super) fn still(&self) -> Result<Still<'_>, Error> {
        let mut now = self.now.lock();
        now.idle()?;
        *now = Now::Still;
        Ok(Still(self))
    }

    /// Why the run that is entered is to end already.
    pub(super) fn end(&self) -> Option<String> {
        match &*self.now.lock() {
            Now::Entering(end) => end.clone(),
            _ => None,
        }
    }

    /// Why its devices cannot change now: vCPUs run, or it is closed. Before they run, a policy may still add some.
    pub(super) fn changeable(&self) -> Result<(), Error> {
        match &*self.now.lock() {
            Now::Entering(_) => Ok(()),
            now => now.idle(),
        }
    }

    /// The vCPUs of the run that was entered begin. If it is to end already, the control is told.
    pub(super) fn begin(&self, control: Arc<Control>) {
        let mut now = self.now.lock();
        let before = std::mem::replace(&mut *now, Now::Running(control.clone()));
        drop(now);
        if let Now::Entering(Some(reason)) = before {
            control.stop(&reason);
        }
    }

    /// The run is over, after so many events of all runs.
    pub(super) fn over(&self, events: u64) {
        // It is not set yet: `enter` has put a new one there.
        let _ = self.watched().0.set(events);
        *self.now.lock() = Now::Idle;
    }

    /// The run in progress, else the last one, else the first.
    pub(super) fn watched(&self) -> Arc<Watched> {
        self.watched.lock().clone()
    }

    /// No run can begin any more.
    pub(super) fn close(&self) -> Result<(), Error> {
        let mut now = self.now.lock();
        if matches!(*now, Now::Entering(_) | Now::Running(_)) {
            return Err(Error::Busy(CLOSE_WHILE_RUNNING));
        }
        if matches!(*now, Now::Still) {
            return Err(Error::Busy(STILL));
        }
        *now = Now::Closed;
        Ok(())
    }
}

impl Now {
    fn idle(&self) -> Result<(), Error> {
        match self {
            Now::Idle => Ok(()),
            Now::Entering(_) | Now::Running(_) => Err(Error::Busy(RUNNING)),
            Now::Still => Err(Error::Busy(STILL)),
            Now::Closed => Err(Error::Busy(CLOSED)),
        }
    }
}

#[cfg(test)]
mod tests;
