//! Missing pages: a page can have a state and no bytes yet. The first access, whoever makes it, asks a pager for them.
//!
//! The host's mapping of a missing page is empty, and userfaultfd(2) holds whoever touches it: a vCPU's thread in KVM_RUN,
//! or KVM itself for its clock or for an instruction that it emulates. So no page is ever seen without its bytes, whatever
//! enforces the states. What this core does by system calls on the file, which userfaultfd does not see, asks first.
//!
//! - [`pager`]: where bytes come from; `page_bits`: which pages are missing; `serve`: the thread that puts them there

mod page_bits;
pub mod pager;
mod serve;

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{fmt, ptr};

use parking_lot::{Condvar, Mutex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) use self::page_bits::PageBits;
pub use self::pager::Came;
use self::pager::{By, Pager};
use super::address::{PAGE_SIZE, Range, State};
use crate::allocation::push;
use crate::errno::Errno;
use crate::error::Error;
use crate::hypervisor::mapping::{Mapping, Touched};
use crate::hypervisor::raw;
use crate::hypervisor::userfault::Userfault;
use crate::input::Watch;
use crate::process::Process;

/// How often who waits for a page looks whether to go on waiting.
const LOOK_AGAIN: Duration = Duration::from_millis(25);
/// How long an access of a vCPU or of a device waits for a pager once the run is to end, and for a page that it failed for.
const PATIENCE: Duration = Duration::from_secs(2);
const PATIENCE_AFTER_FAILURE: Duration = Duration::from_millis(100);

thread_local! {
    /// Whose pager this thread is calling.
    static CALLING: Cell<*const Missing> = const { Cell::new(ptr::null()) };
}

/// What threads of devices are called, and those that they start.
pub(crate) const DEVICE_THREAD: &str = "pagegate-device";
pub(crate) const HELPER_THREAD: &str = "pagegate-helper";
const DEVICES: [&str; 2] = [DEVICE_THREAD, HELPER_THREAD];

/// What a pager's thread needs of the machine.
pub(crate) struct Surroundings {
    /// The vCPU that a thread runs.
    pub vcpu: Box<dyn Fn(libc::pid_t) -> Option<u32> + Send + Sync>,
    /// Ends the run in progress with this error; gives it back if there is none.
    pub end: Box<dyn Fn(Error) -> Result<(), Error> + Send + Sync>,
    /// A page came, or the pager failed.
    pub note: Box<dyn Fn(&Came) + Send + Sync>,
    /// Whether the run in progress is ending.
    pub is_ending: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Where the bytes of a side are put.
pub(crate) struct Side {
    pub mapping: Arc<Mapping>,
    pub touched: Arc<Touched>,
}

/// The missing pages of both sides.
pub(crate) struct Missing {
    /// By state.
    sides: [Side; 2],
    userfault: Userfault,
    /// Another one after a reset.
    pager: Mutex<Arc<dyn Pager>>,
    /// A child that was forked has the mappings' contents, but not this thread; and with the descriptor it would change what
    /// its parent's mappings do.
    process: Process,
    surroundings: Surroundings,
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Written to for asks and for the end.
    wake: EventFd,
    /// Whether any page is missing. Read without the mutex by each access of the core.
    any: AtomicBool,
}

struct Inner {
    /// By state.
    pages: [PageBits; 2],
    asks: VecDeque<Ask>,
    /// What the pager is asked for now: its gpa.
    asked: Option<u64>,
    /// Touched by threads that sleep on, because the pager failed: state and gpa. It is not asked again in this run.
    unanswered: Vec<(State, u64)>,
    came: Vec<Came>,
    /// How often other pages have become missing.
    epoch: u64,
    /// Why no page comes any more.
    over: Option<Over>,
}

/// Why no page comes any more.
#[derive(Clone, Debug)]
enum Over {
    /// None is missing.
    AllCame,
    /// The machine is closed.
    Closed,
    /// It is being put back to a snapshot: other pages will be missing.
    Resetting,
    /// Somebody needed a page that did not come, and could not be kept from going on without it.
    Lost(Arc<str>),
}

/// This process wants a page.
struct Ask {
    state: State,
    gpa: u64,
    by: By,
    failure: Arc<Mutex<Option<Error>>>,
}

impl Missing {
    /// With these pages missing, by state. A thread of its own is to [`serve`](Self::serve) it.
    ///
    /// # Errors
    /// `NotSupported` where userfaultfd(2) cannot be had; `Host` where it fails.
    pub(crate) fn new(
        sides: [Side; 2],
        pages: [PageBits; 2],
        pager: Arc<dyn Pager>,
        surroundings: Surroundings,
    ) -> Result<Self, Error> {
        let userfault = Userfault::new().map_err(|errno| {
            Error::NotSupported(format!(
                "pages that come when they are touched need userfaultfd(2), which failed with {errno}: be root, or have root \
                 set the sysctl vm.unprivileged_userfaultfd to 1 or make /dev/userfaultfd readable and writable for you"
            ))
        })?;
        let wake = EventFd::new(EFD_NONBLOCK);
        let what = "make an eventfd";
        let wake = wake.map_err(|error| Error::Host {
            what,
            errno: error.into(),
        })?;
        let missing = Self {
            sides,
            userfault,
            pager: Mutex::new(pager),
            process: Process::default(),
            surroundings,
            any: AtomicBool::new(pages.iter().any(|pages| !pages.is_empty())),
            inner: Mutex::new(Inner {
                pages,
                asks: VecDeque::new(),
                asked: None,
                unanswered: Vec::new(),
                came: Vec::new(),
                epoch: 0,
                over: None,
            }),
            changed: Condvar::new(),
            wake,
        };
        missing.watch()?;
        Ok(missing)
    }

    /// From now on who touches what is not there sleeps.
    fn watch(&self) -> Result<(), Error> {
        for side in &self.sides {
            self.userfault.watch(&side.mapping).map_err(|errno| Error::Host {
                what: "watch the guest's memory for missing pages",
                errno,
            })?;
        }
        Ok(())
    }

    /// These pages are missing now, and no others, and this pager has their bytes. Between runs, of memory that has nothing
    /// else, whose pages the caller holds; the thread that served it before has ended, and another is to
    /// [`serve`](Self::serve) it.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn begin_again(&self, pages: [PageBits; 2], pager: Arc<dyn Pager>) -> Result<(), Error> {
        self.watch()?;
        let before = std::mem::replace(&mut *self.pager.lock(), pager);
        let mut inner = self.inner.lock();
        self.any
            .store(pages.iter().any(|pages| !pages.is_empty()), Ordering::Release);
        inner.pages = pages;
        inner.asks.clear();
        inner.unanswered.clear();
        inner.came.clear();
        inner.epoch += 1;
        inner.over = None;
        drop(inner);
        self.changed.notify_all();
        // Not with a lock held: it may be Python's.
        drop(before);
        Ok(())
    }

    /// Bytes of both sides that are missing.
    pub(crate) fn bytes(&self) -> u64 {
        let inner = self.inner.lock();
        inner.pages.iter().map(|pages| pages.count() * PAGE_SIZE).sum()
    }

    /// The pages that the pager was asked for, in this order.
    pub(crate) fn came(&self) -> Vec<Came> {
        self.inner.lock().came.clone()
    }

    /// Whether a page of this range is missing.
    pub(crate) fn is_any_in(&self, state: State, range: Range) -> bool {
        self.any.load(Ordering::Acquire) && self.inner.lock().pages[state as usize].first_in(range).is_some()
    }

    /// These pages are zeroes from now on, on this side; the pager is not asked for them any more.
    pub(crate) fn forget(&self, state: State, range: Range) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut inner = self.inner.lock();
        inner.pages[state as usize].remove(range);
        let any = inner.any_is_missing();
        self.any.store(any, Ordering::Release);
        drop(inner);
        self.changed.notify_all();
        if !any {
            self.tell();
        }
    }

    /// Waits until no page of the range is missing on this side.
    ///
    /// # Errors
    /// `Pager` where the pager fails; `Interrupted` for a failure of `watch`, which is called some forty times a second.
    pub(crate) fn bring(&self, state: State, range: Range, watch: &mut Watch<'_>) -> Result<(), Error> {
        if !self.any.load(Ordering::Acquire) {
            return Ok(());
        }
        self.check_process()?;
        let by = self.caller();
        let mut ending = None;
        let mut inner = self.inner.lock();
        let mut rest = Some(range);
        while let Some(gpa) = rest.and_then(|rest| inner.pages[state as usize].first_in(rest)) {
            match &inner.over {
                Some(Over::Resetting) => {
                    self.changed.wait_for(&mut inner, LOOK_AGAIN);
                    drop(inner);
                    watch().map_err(Error::Interrupted)?;
                    inner = self.inner.lock();
                    rest = Some(range);
                    continue;
                }
                Some(over) => return Err(over.error()),
                None => {}
            }
            let (failure, epoch) = (Arc::default(), inner.epoch);
            inner.asks.push_back(Ask {
                state,
                gpa,
                by,
                failure: Arc::clone(&failure),
            });
            self.tell();
            let is_missing = |inner: &Inner| {
                inner.pages[state as usize].contains(gpa) && inner.over.is_none() && inner.epoch == epoch
            };
            while is_missing(&inner) {
                self.changed.wait_for(&mut inner, LOOK_AGAIN);
                if let Some(error) = failure.lock().take() {
                    return Err(error);
                }
                drop(inner);
                // A run's end waits for its vCPUs and devices, but not for ever.
                let in_time = by == By::Host
                    || !(self.surroundings.is_ending)()
                    || ending.get_or_insert_with(Instant::now).elapsed() < PATIENCE;
                let watched = match in_time {
                    true => watch(),
                    false => Err(format!("the run is ending, and the pager has not answered for page {gpa:#x}").into()),
                };
                inner = self.inner.lock();
                if let Err(why) = watched {
                    inner.asks.retain(|ask| !Arc::ptr_eq(&ask.failure, &failure));
                    return Err(Error::Interrupted(why));
                }
            }
            // Those before it are there, unless others have become missing.
            let from = if inner.epoch == epoch { gpa } else { range.gpa() };
            rest = Range::new(from, range.end() - from);
        }
        Ok(())
    }

    /// The same for an access that a guest's request needs, for which a failure ends the run. One that is given up because the
    /// run is ending loses the machine: the guest must not see what comes of it.
    ///
    /// # Errors
    /// EIO where the page does not come.
    pub(crate) fn bring_in_run(&self, state: State, range: Range) -> Result<(), Errno> {
        self.bring(state, range, &mut || Ok(())).map_err(|error| {
            match error {
                Error::Interrupted(why) => self.lose(&why.to_string()),
                // Without a run whoever accesses has the errno.
                error => drop((self.surroundings.end)(error)),
            }
            Errno(libc::EIO)
        })
    }

    /// Fails in a child that was forked.
    fn check_process(&self) -> Result<(), Error> {
        match self.process.is_present() {
            true => Ok(()),
            false => Err(Error::Busy(
                "this machine is that of the process that this one was forked from: its missing pages come there only",
            )),
        }
    }

    /// Calls the pager; meanwhile [`is_calling`](Self::is_calling) is true.
    fn inside<T>(&self, call: impl FnOnce() -> T) -> T {
        struct Over;
        impl Drop for Over {
            fn drop(&mut self) {
                CALLING.set(ptr::null());
            }
        }
        CALLING.set(self);
        let _over = Over;
        call()
    }

    /// Whether the calling thread is inside the pager of this memory: whoever waits for the page may have locked others.
    pub(crate) fn is_calling(&self) -> bool {
        ptr::eq(CALLING.get(), self)
    }

    /// Who touches the memory in the calling thread.
    fn caller(&self) -> By {
        let is_device = || {
            std::thread::current()
                .name()
                .is_some_and(|name| DEVICES.contains(&name))
        };
        match (self.surroundings.vcpu)(raw::thread_id()) {
            Some(vcpu) => By::Vcpu(vcpu),
            None if is_device() => By::Device,
            None => By::Host,
        }
    }

    /// Has those touch their pages again for which the pager failed, before a run.
    ///
    /// # Errors
    /// `Lost` if no page comes any more; `Busy` in a child that was forked.
    pub(crate) fn ask_again(&self) -> Result<(), Error> {
        self.check_process()?;
        let mut inner = self.inner.lock();
        match &inner.over {
            Some(over @ Over::Lost(_)) => return Err(over.error()),
            Some(over) if inner.any_is_missing() => return Err(over.error()),
            _ => {}
        }
        for (state, gpa) in std::mem::take(&mut inner.unanswered) {
            // If they sleep no more, nothing happens.
            let _ = self.userfault.wake(self.side(state).mapping.address(gpa), PAGE_SIZE);
        }
        Ok(())
    }

    /// A vCPU has been told to leave KVM_RUN, for so long now, and has not. If it waits for a page, no page comes any more: a
    /// vCPU that touches one itself is woken by a signal, but KVM does not let go of an instruction that it emulates before
    /// it has the page (Linux: fault_signal_pending() in arch/x86/mm/fault.c). It gets zeroes, and never runs again.
    pub(crate) fn give_up_after(&self, waited: Duration) {
        let inner = self.inner.lock();
        let (gpa, patience, why) = match (inner.unanswered.first(), inner.asked) {
            (Some((_, gpa)), _) => (*gpa, PATIENCE_AFTER_FAILURE, "for which the pager has failed"),
            (None, Some(gpa)) => (
                gpa,
                PATIENCE,
                "for which the pager had no answer when the run was to end",
            ),
            (None, None) => return,
        };
        drop(inner);
        if waited >= patience {
            self.lose(&format!("a vCPU could not leave KVM_RUN without page {gpa:#x}, {why}"));
        }
    }

    /// Whether the pager has been called and has not answered yet, after a moment in which it may.
    pub(crate) fn is_hanging(&self) -> bool {
        let begun = Instant::now();
        let mut inner = self.inner.lock();
        while inner.asked.is_some() && begun.elapsed() < PATIENCE {
            self.changed.wait_for(&mut inner, LOOK_AGAIN);
        }
        inner.asked.is_some()
    }

    /// No page comes any more: the machine is closed. Whoever sleeps wakes.
    pub(crate) fn end(&self) {
        self.end_because(Over::Closed);
        self.tell();
    }

    /// No page comes until [`begin_again`](Self::begin_again). The caller holds all pages, so nobody waits who has locked any.
    pub(crate) fn pause(&self) {
        self.inner.lock().over = None;
        self.end_because(Over::Resetting);
        self.tell();
    }

    /// No page comes any more, nor runs the machine, because of this.
    pub(crate) fn lose(&self, why: &str) {
        let mut inner = self.inner.lock();
        inner.over = None;
        drop(inner);
        self.end_because(Over::Lost(why.into()));
        self.tell();
    }

    fn side(&self, state: State) -> &Side {
        &self.sides[state as usize]
    }

    fn end_because(&self, why: Over) {
        if !self.process.is_present() {
            return;
        }
        let mut inner = self.inner.lock();
        inner.over.get_or_insert(why);
        // Who waits looks whether it is over.
        inner.asks.clear();
        drop(inner);
        for side in &self.sides {
            // They sleep until the descriptor is closed, if there is no memory for this.
            let _ = self.userfault.release(&side.mapping);
        }
        self.changed.notify_all();
    }

    fn tell(&self) {
        // It can only be full if it is not read, and then it need not be told.
        let _ = self.wake.write(1);
    }
}

impl fmt::Debug for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Missing")
            .field("any", &self.any)
            .finish_non_exhaustive()
    }
}

impl Inner {
    fn any_is_missing(&self) -> bool {
        self.pages.iter().any(|pages| !pages.is_empty())
    }

    fn note(&mut self, came: Came) {
        // A list of what came is not worth the end of a run.
        let _ = push(&mut self.came, came);
    }
}

impl Over {
    fn error(&self) -> Error {
        match self {
            Over::AllCame | Over::Closed | Over::Resetting => {
                Error::Busy("this machine is closed: its missing pages do not come any more")
            }
            Over::Lost(why) => Error::Lost(why.clone()),
        }
    }
}
