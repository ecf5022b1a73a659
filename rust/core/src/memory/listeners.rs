//! Who is told of conversions: a device model that maps shared memory, a log of what is exposed, migration.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use super::address::{Range, State};
use super::page_map::Snapshot;
use crate::error::{ConvertError, Failure};

/// Pages that are converted, all of them from the one state to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The pages.
    pub range: Range,
    /// What they become.
    pub to: State,
    /// They are in that state already: this is what a listener that joins is told first.
    pub initial: bool,
}

/// Is told of every conversion, whoever asked for it, while the pages are locked: it must not convert, read or write
/// guest memory from within.
///
/// To private: `prepare` before KVM changes anything, so that the pages can be let go of, then `committed` or
/// `aborted`. To shared: `committed` alone, when the pages can be used.
pub trait Listener: Send + Sync {
    /// Pages are about to become private. `false` refuses.
    ///
    /// # Errors
    /// A failure refuses too, and ends the run.
    fn prepare(&self, change: &Change) -> Result<bool, Failure>;
    /// Pages changed.
    ///
    /// # Errors
    /// A failure ends the run; the conversion stands.
    fn committed(&self, change: &Change) -> Result<(), Failure>;
    /// Pages that were prepared do not change after all.
    ///
    /// # Errors
    /// A failure ends the run.
    fn aborted(&self, change: &Change) -> Result<(), Failure>;
}

#[derive(Default)]
pub(crate) struct Listeners {
    all: RwLock<Vec<Arc<dyn Listener>>>,
    /// Whether there is one, for every conversion to read where locks would keep vCPUs apart. Written with `all` locked.
    any: AtomicBool,
}

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether the calling thread is inside a listener, where it holds pages and must not ask for others.
pub(crate) fn inside() -> bool {
    INSIDE.get()
}

/// Marks the thread for the time of a call.
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

    /// Tells a newcomer the present state, and then keeps it. The caller holds all of memory.
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

    /// Asks all listeners about a conversion; after a refusal those that had agreed are told that it is off.
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

    /// Tells all listeners that a prepared conversion is off.
    pub(crate) fn abort(&self, changes: &Changes<'_>) -> Result<(), Failure> {
        match changes.to {
            State::Private => abort(&self.all.read().clone(), changes, usize::MAX),
            State::Shared => Ok(()),
        }
    }

    /// Tells all listeners that a conversion is done. All are told, whatever one of them says.
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

/// What a conversion of `range` changes.
pub(crate) struct Changes<'a> {
    pub before: &'a Snapshot,
    pub range: Range,
    pub to: State,
}

impl Changes<'_> {
    fn each(&self) -> impl Iterator<Item = Change> + '_ {
        let changing = self.before.runs_in(self.range).filter(|run| run.state != self.to);
        changing.map(|run| Change {
            range: run.range,
            to: self.to,
            initial: false,
        })
    }
}
