//! Listeners: what is told of conversions, such as a device model that maps shared memory, or migration.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};

use super::address::{Range, Run, State};
use super::page_map::Snapshot;
use super::range_set::RangeSet;
use crate::error::{ConvertError, Failure};

/// Pages that are converted. All of them are in the other state before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The pages.
    pub range: Range,
    /// The state that they are converted to.
    pub to: State,
    /// Whether they are in that state already: a new listener is told the present states first, and one that failed is
    /// told again.
    pub initial: bool,
}

/// Is told of every conversion, the host's own included. It is called with the pages locked, so it must not convert,
/// read or write guest memory.
///
/// To private: `prepare` before KVM changes anything, so that it can stop using the pages, then `committed` or
/// `aborted`. To shared: only `committed`, when the pages can be used.
///
/// If it fails, whichever method it is, it is told the state that the pages are in then, by `committed`: at once, and if it
/// fails again, before the next run.
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
    all: RwLock<Vec<Arc<Listening>>>,
    /// Whether there is one. Every conversion reads it without a lock; written with `all` locked.
    any: AtomicBool,
    /// It says so whether there are any or not.
    always: AtomicBool,
}

/// A listener, and what it does not know because it failed.
struct Listening {
    listener: Arc<dyn Listener>,
    /// Pages of whose state it has to be told, each once, however often it failed.
    untold: Mutex<RangeSet>,
}

impl Listening {
    /// Calls it about pages.
    fn call_about<T>(
        &self,
        range: Range,
        method: impl FnOnce(&dyn Listener) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let result = call(|| method(self.listener.as_ref()));
        if result.is_err() {
            self.untold.lock().add(range);
        }
        result
    }

    /// Tells it the present state of the pages.
    fn tell(&self, range: Range, present: &[Run]) -> Result<(), Failure> {
        let tell = |listener: &dyn Listener| {
            present
                .iter()
                .try_for_each(|run| listener.committed(&Change::initial(run)))
        };
        self.call_about(range, tell)
    }
}

impl Change {
    fn initial(run: &Run) -> Self {
        Self {
            range: run.range,
            to: run.state,
            initial: true,
        }
    }
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

    /// From now on [`is_empty`](Self::is_empty) is never true. Before the first conversion, or between two.
    pub(super) fn never_empty(&self) {
        self.always.store(true, Ordering::SeqCst);
        self.any.store(true, Ordering::SeqCst);
    }

    fn is_always(&self) -> bool {
        self.always.load(Ordering::SeqCst)
    }

    /// Tells a new listener the present states and adds it. The caller has locked all of memory.
    pub(crate) fn join(&self, listener: Arc<dyn Listener>, present: &[Run]) -> Result<(), Failure> {
        for run in present {
            call(|| listener.committed(&Change::initial(run)))?;
        }
        let mut listeners = self.all.write();
        listeners.push(Arc::new(Listening {
            listener,
            untold: Mutex::default(),
        }));
        self.any.store(true, Ordering::SeqCst);
        Ok(())
    }

    pub(crate) fn leave(&self, listener: &Arc<dyn Listener>) -> bool {
        let mut listeners = self.all.write();
        let before = listeners.len();
        listeners.retain(|other| !Arc::ptr_eq(&other.listener, listener));
        self.any
            .store(!listeners.is_empty() || self.is_always(), Ordering::SeqCst);
        listeners.len() < before
    }

    pub(crate) fn clear(&self) {
        let mut listeners = self.all.write();
        let all = std::mem::take(&mut *listeners);
        self.any.store(self.is_always(), Ordering::SeqCst);
        drop(listeners);
        // Not with the lock held: it may run Python code.
        drop(all);
    }

    /// Those that there are now. A conversion takes them once and tells them to its end, also if one leaves meanwhile.
    pub(crate) fn present(&self) -> Present {
        Present(self.all.read().clone())
    }

    /// The pages of whose state listeners have to be told.
    pub(super) fn untold(&self) -> RangeSet {
        let Present(listeners) = self.present();
        let mut all = RangeSet::default();
        for listener in &listeners {
            let untold = listener.untold.lock();
            untold.ranges().iter().for_each(|range| all.add(*range));
        }
        all
    }
}

/// The listeners of one conversion.
pub(crate) struct Present(Vec<Arc<Listening>>);

impl Present {
    /// Asks all of them about a conversion. After a refusal calls `aborted` of those that had agreed.
    pub(crate) fn prepare(&self, changes: &Changes<'_>) -> Result<(), ConvertError> {
        if changes.to == State::Shared {
            return Ok(());
        }
        let mut agreed = 0;
        for change in changes.each() {
            for listener in &self.0 {
                match listener.call_about(change.range, |listener| listener.prepare(&change)) {
                    Ok(true) => agreed += 1,
                    Ok(false) => {
                        let (gpa, size) = (change.range.gpa(), change.range.size());
                        let off = self.abort_first(changes, agreed);
                        return Err(off
                            .err()
                            .map_or(ConvertError::Refused { gpa, size }, ConvertError::Listener));
                    }
                    Err(failure) => {
                        // The first failure is the one to report.
                        let _ = self.abort_first(changes, agreed);
                        return Err(ConvertError::Listener(failure));
                    }
                }
            }
        }
        Ok(())
    }

    /// Tells all of them that a prepared conversion is not carried out.
    pub(crate) fn abort(&self, changes: &Changes<'_>) -> Result<(), Failure> {
        match changes.to {
            State::Private => self.abort_first(changes, usize::MAX),
            State::Shared => Ok(()),
        }
    }

    /// Tells all of them that a conversion is done. A failure does not keep the others from being told.
    pub(crate) fn commit(&self, changes: &Changes<'_>) -> Result<(), Failure> {
        let mut result = Ok(());
        for change in changes.each() {
            for listener in &self.0 {
                let told = listener.call_about(change.range, |listener| listener.committed(&change));
                result = result.and(told);
            }
        }
        result
    }

    /// Tells those that failed the present states of pages in `held`, which the caller has locked.
    pub(crate) fn tell_again(&self, held: Range, present: &dyn Fn(Range) -> Vec<Run>) -> Result<(), Failure> {
        let mut result = Ok(());
        for listener in &self.0 {
            let untold = listener.untold.lock().take(held);
            for range in untold {
                result = result.and(listener.tell(range, &present(range)));
            }
        }
        result
    }

    /// Calls `aborted` for the first `agreed` calls of `prepare`.
    fn abort_first(&self, changes: &Changes<'_>, agreed: usize) -> Result<(), Failure> {
        let asked = changes
            .each()
            .flat_map(|change| self.0.iter().map(move |listener| (change, listener)));
        let mut result = Ok(());
        for (change, listener) in asked.take(agreed) {
            let told = listener.call_about(change.range, |listener| listener.aborted(&change));
            result = result.and(told);
        }
        result
    }
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
