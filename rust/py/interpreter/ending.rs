//! The end of the interpreter: what runs is stopped and waited for before it. After that nothing may run Python.
//!
//! `atexit` calls [`end`] while threads can still attach. Later CPython ends a thread that attaches, up to 3.13, and
//! from 3.14 on keeps it waiting for ever: such a thread never comes back from its hook (see [`super::call`]).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use pagegate_core::machine::assembly::Machine;
use pagegate_core::process::Process;
use pyo3::prelude::*;

use super::errors;

/// How long the interpreter's end waits for hooks, handlers and listeners that are being called.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often machines are told to stop meanwhile: one may just be beginning its run.
const TELL_AGAIN: Duration = Duration::from_millis(10);

/// The machines that run.
static RUNNING: Mutex<Vec<Running>> = Mutex::new(Vec::new());
/// The machines whose pager needs the interpreter.
static PAGED: Mutex<Vec<Weak<Machine>>> = Mutex::new(Vec::new());
/// One of them does no more.
static OVER: Condvar = Condvar::new();
/// No run may begin.
static ENDING: AtomicBool = AtomicBool::new(false);
/// A run did not end in time. Its threads may hold locks, and will not come back.
static ABANDONED: AtomicBool = AtomicBool::new(false);

struct Running {
    machine: Weak<Machine>,
    /// A child that is forked meanwhile has nothing to wait for.
    process: Process,
}

fn running() -> MutexGuard<'static, Vec<Running>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A machine's run, from its claim on: the end of the interpreter stops it and waits until this is dropped.
pub(crate) struct Listed(Weak<Machine>);

impl Listed {
    /// PagegateError once the interpreter is ending.
    pub(crate) fn new(py: Python<'_>, machine: &Arc<Machine>) -> PyResult<Self> {
        let machine = Arc::downgrade(machine);
        let mut running = running();
        if ENDING.load(Ordering::SeqCst) {
            drop(running);
            return Err(errors::busy(py, "the interpreter is ending: no run can begin"));
        }
        running.push(Running {
            machine: machine.clone(),
            process: Process::default(),
        });
        Ok(Self(machine))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut running = running();
        if let Some(at) = running.iter().rposition(|other| other.machine.ptr_eq(&self.0)) {
            running.swap_remove(at);
        }
        OVER.notify_all();
    }
}

/// The end of the interpreter ends this machine's pager, too, whose thread would else be waited for later, and not end.
pub(crate) fn has_pager(machine: &Arc<Machine>) {
    let mut paged = PAGED.lock().unwrap_or_else(PoisonError::into_inner);
    paged.retain(|machine| machine.strong_count() > 0);
    paged.push(Arc::downgrade(machine));
}

fn end_pagers(deadline: Instant) {
    let paged = std::mem::take(&mut *PAGED.lock().unwrap_or_else(PoisonError::into_inner));
    for machine in paged.iter().filter_map(Weak::upgrade) {
        machine.end_pager(deadline);
    }
}

/// PagegateError after the end of the interpreter gave up waiting: to wait for a lock could last for ever.
pub(crate) fn still_going(py: Python<'_>) -> PyResult<()> {
    match ABANDONED.load(Ordering::Relaxed) {
        false => Ok(()),
        true => Err(errors::busy(
            py,
            "the interpreter is ending, and a hook that was being called has not returned",
        )),
    }
}

/// Stops all runs, waits for them for two seconds, and lets no other begin; and ends all pagers.
#[pyfunction]
#[pyo3(name = "_end")]
pub(crate) fn end(py: Python<'_>) {
    py.detach(|| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut runs = running();
            ENDING.store(true, Ordering::SeqCst);
            runs.retain(|run| run.process.is_present());
            if runs.is_empty() {
                break;
            }
            let machines: Vec<_> = runs.iter().filter_map(|run| run.machine.upgrade()).collect();
            drop(runs);
            machines.iter().for_each(|machine| machine.stop());
            // Not with the lock held, and not at the end of the loop: this may be the last reference.
            drop(machines);
            if Instant::now() >= deadline {
                ABANDONED.store(true, Ordering::Relaxed);
                break;
            }
            let runs = running();
            if !runs.is_empty() {
                drop(OVER.wait_timeout(runs, TELL_AGAIN));
            }
        }
        end_pagers(deadline);
    });
}
