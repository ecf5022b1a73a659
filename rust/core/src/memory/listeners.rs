//! Listeners: what is told of conversions, such as a device model that maps shared memory, or migration.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use super::address::{Range, State};
use super::page_map::Snapshot;
use crate::error::{ConvertError, Failure};

/// Pages that are converted. All of them are in the other state before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The pages.
    pub range: Range,
    /// The state that they are converted to.
    pub to: State,
    /// Whether they are in that state already: a new listener is told the present states first.
    pub initial: bool,
}

/// Is told of every conversion, the host's own included. It is called with the pages locked, so it must not convert,
/// read or write guest memory.
///
/// To private: `prepare` before KVM changes anything, so that it can stop using the pages, then `committed` or
/// `aborted`. To shared: only `committed`, when the pages can be used.
pub trait Listener: Send + Sync {
    /// Pages are about to become private. `false` refuses.
    ///
    /// # Errors
    /// A failure refuses too, and ends the run.
    fn prepare(&self, change: &Change) -> Result<bool, Failure>;
    /// Pages were converted.
    ///
    /// # Errors
    /// A failure ends the run; the conversion stands.
    fn committed(&self, change: &Change) -> Result<(), Failure>;
    /// A conversion that was prepared is not carried out.
    ///
    /// # Errors
    /// A failure ends the run.
    fn aborted(&self, change: &Change) -> Result<(), Failure>;
}

#[derive(Default)]
pub(crate) struct Listeners {
    all: RwLock<Vec<Arc<dyn Listener>>>,
    /// Whether there is one. Every conversion reads it without a lock; written with `all` locked.
    any: AtomicBool,
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is inside a listener: then it has locked pages and must not lock others.
pub(crate) fn inside() -> bool {
    INSIDE.get()
}

/// Calls a listener; meanwhile [`inside`] is true.
fn call<T>(listener: impl FnOnce() -> T) -> T {
    struct Outside;
    impl Drop for Outside {
        fn drop(&mut self) {
            INSIDE.set(false);
        }
    }
    INSIDE.set(true);
    let _outside = Outside;
    listener()
}

impl Listeners {
    pub(crate) fn is_empty(&self) -> bool {
        !self.any.load(Ordering::SeqCst)
    }

    /// Tells a new listener the present states and adds it. The caller has locked all of memory.
    pub(crate) fn join(&self, listener: Arc<dyn Listener>, present: &Snapshot) -> Result<(), Failure> {
        for run in present.runs() {
            let (range, to) = (run.range, run.state);
            let change = Change {
                range,
                to,
                initial: true,
            };
            call(|| listener.committed(&change))?;
        }
        let mut listeners = self.all.write();
        listeners.push(listener);
        self.any.store(true, Ordering::SeqCst);
        Ok(())
    }

    pub(crate) fn leave(&self, listener: &Arc<dyn Listener>) -> bool {
        let mut listeners = self.all.write();
        let before = listeners.len();
        listeners.retain(|other| !Arc::ptr_eq(other, listener));
        self.any.store(!listeners.is_empty(), Ordering::SeqCst);
        listeners.len() < before
    }

    pub(crate) fn clear(&self) {
        let mut listeners = self.all.write();
        listeners.clear();
        self.any.store(false, Ordering::SeqCst);
    }

    /// Asks all listeners about a conversion. After a refusal calls `aborted` of those that had agreed.
    pub(crate) fn prepare(&self, changes: &Changes<'_>) -> Result<(), ConvertError> {
        if changes.to == State::Shared {
            return Ok(());
        }
        let listeners = self.all.read().clone();
        let mut agreed = 0;
        for change in changes.each() {
            for listener in &listeners {
                match call(|| listener.prepare(&change)) {
                    Ok(true) => agreed += 1,
                    Ok(false) => {
                        let (gpa, size) = (change.range.gpa(), change.range.size());
                        let off = abort(&listeners, changes, agreed);
                        return Err(off
                            .err()
                            .map_or(ConvertError::Refused { gpa, size }, ConvertError::Listener));
                    }
                    Err(failure) => {
                        // The first failure is the one to report.
                        let _ = abort(&listeners, changes, agreed);
                        return Err(ConvertError::Listener(failure));
                    }
                }
            }
        }
        Ok(())
    }

    /// Tells all listeners that a prepared conversion is not carried out.
    pub(crate) fn abort(&self, changes: &Changes<'_>) -> Result<(), Failure> {
        match changes.to {
            State::Private => abort(&self.all.read().clone(), changes, usize::MAX),
            State::Shared => Ok(()),
        }
    }

    /// Tells all listeners that a conversion is done. A failure does not keep the others from being told.
    pub(crate) fn commit(&self, changes: &Changes<'_>) -> Result<(), Failure> {
        let listeners = self.all.read().clone();
        let mut result = Ok(());
        for change in changes.each() {
            for listener in &listeners {
                let told = call(|| listener.committed(&change));
                result = result.and(told);
            }
        }
        result
    }
}

/// Calls `aborted` for the first `agreed` calls of `prepare`.
fn abort(listeners: &[Arc<dyn Listener>], changes: &Changes<'_>, agreed: usize) -> Result<(), Failure> {
    let asked = changes
        .each()
        .flat_map(|change| listeners.iter().map(move |listener| (change, listener)));
    let mut result = Ok(());
    for (change, listener) in asked.take(agreed) {
        let told = call(|| listener.aborted(&change));
        result = result.and(told);
    }
    result
}

/// A conversion of `range`, of which only the pages that are not in `to` change.
pub(crate) struct Changes<'a> {
    pub before: &'a Snapshot,
    pub range: Range,
    pub to: State,
}

impl Changes<'_> {
    fn each(&self) -> impl Iterator<Item = Change> + '_ {
        let other = self.before.runs_in(self.range).filter(|run| run.state != self.to);
        other.map(|run| Change {
            range: run.range,
            to: self.to,
            initial: false,
        })
    }
}
