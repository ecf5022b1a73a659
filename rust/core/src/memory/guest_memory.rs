//! Guest memory with the state of each page: everything but conversions, which are in `conversion.rs`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::address::{Range, Run, State};
use super::backing::{Backing, Sides};
pub(crate) use super::enforcement::Pause;
use super::enforcement::{Enforcement, NotEnforced};
use super::listeners::{self, Listener, Listeners};
use super::missing::Missing;
use super::open_pages::OpenPages;
use super::page_map::{AttributeMap, Snapshot};
use super::page_states::{PageStates, Seen, States};
use super::views::{Place, Views};
use crate::allocation::check_room;
use crate::errno::Errno;
use crate::error::{ConvertError, Error, Failure};
use crate::hypervisor::host::EnforcementMode;
use crate::hypervisor::vm::Hypervisor;
use crate::input::Watch;

/// How often a thread that waits to begin a run looks whether the run is to end.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_millis(25);

/// What guest memory is made of.
pub(crate) struct Layout {
    pub views: Views,
    pub initial: State,
    pub mode: EnforcementMode,
    /// No memslot crosses these addresses.
    pub borders: Vec<u64>,
    /// The private side is host memory, also where the VM can have a guest_memfd.
    pub host_memory: bool,
    pub vcpus: usize,
}

/// How much memory a machine's guest occupies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    /// Bytes of the shared side.
    pub shared: u64,
    /// Bytes of the private side.
    pub private: u64,
    /// Whether `private` was counted. If not, it is an upper bound: the size of all private pages.
    pub exact: bool,
}

/// Whether the host is kept from private bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seal {
    /// It is.
    Whole,
    /// Somebody wants to look at them, and has said so.
    Broken,
}

/// Why the host could not access bytes.
pub(crate) enum NoAccess {
    /// They do not all lie in memory.
    Outside,
    /// The page at this gpa is private, and the seal whole or the private side out of the host's reach. Nothing was
    /// copied.
    Private(u64),
    /// Copying failed.
    Failed(Errno),
}

/// Copies a part of the bytes: the side that they are on, their gpa there, and which they are of all.
pub(crate) type Copy<'a> = &'a mut dyn FnMut(&Backing, u64, std::ops::Range<usize>) -> Result<(), Errno>;

/// What a vCPU had seen when it entered the guest. It tells whether a fault is spurious.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    generation: u64,
    slot_epoch: u64,
}

/// An access that faulted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FaultingAccess {
    pub page: Range,
    /// The state that the page would have to be in.
    pub access: State,
    /// The vCPU's last entry into the guest.
    pub entry: Entry,
}

/// What a fault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultStatus {
    /// The page is not in the accessed state: a request.
    Request,
    /// The page's state or its memslots changed since the vCPU entered: the guest tries again.
    Spurious,
    /// The page has been in the accessed state since the vCPU entered: no conversion helps.
    Unexplained,
}

/// Guest memory: the states, their enforcement, and the bytes.
pub struct GuestMemory {
    views: Views,
    pub(super) states: PageStates,
    pub(super) listeners: Listeners,
    pub(super) enforcement: Enforcement,
    pub(super) hypervisor: Arc<dyn Hypervisor>,
    /// What is open for vCPUs without paging.
    pub(super) unpaged: OpenPages,
    /// Nothing is converted any more: a conversion failed and could not be undone, so what KVM enforces is unknown, or
    /// the machine is closed. Read with the pages held.
    pub(super) frozen: AtomicBool,
    /// Whether it is the latter.
    pub(super) closed: AtomicBool,
    /// A conversion kept its old side, so bytes on the shared side of private pages may be wanted and are not freed.
    pub(super) kept: AtomicBool,
    /// Set once, if pages are ever missing.
    pub(super) missing: OnceLock<Arc<Missing>>,
    /// The last field, so that it is dropped after the VM, whose memslots point into it.
    pub(super) sides: Arc<Sides>,
}

impl GuestMemory {
    pub(crate) fn new(hypervisor: Arc<dyn Hypervisor>, layout: Layout, watch: &mut Watch<'_>) -> Result<Self, Error> {
        let Layout {
            views, initial, mode, ..
        } = layout;
        check_room(AttributeMap::bytes_for(views.memory_end())).map_err(|errno| Error::Host {
            what: "keep the states of the guest's pages",
            errno,
        })?;
        let sides = Sides::new(views.memory_end(), layout.host_memory, hypervisor.as_ref())?;
        let sides = Arc::new(sides);
        let enforcement = Enforcement::new(mode, hypervisor.clone(), sides.clone(), views, layout.borders);
        for ram in views.ram() {
            let started = enforcement.start(ram, initial, watch);
            started.map_err(Error::Interrupted)?.map_err(not_set_up)?;
        }
        Ok(Self {
            states: PageStates::new(views, initial, layout.vcpus),
            listeners: Listeners::default(),
            unpaged: OpenPages::default(),
            frozen: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            kept: AtomicBool::new(false),
            missing: OnceLock::new(),
            views,
            enforcement,
            hypervisor,
            sides,
        })
    }

    /// The guest-physical addresses of memory.
    #[inline]
    pub fn views(&self) -> &Views {
        &self.views
    }

    /// Bytes of memory.
    #[inline]
    pub fn size(&self) -> u64 {
        self.views.size()
    }

    /// How states are enforced.
    pub fn mode(&self) -> EnforcementMode {
        self.enforcement.mode()
    }

    /// Where vCPUs wait while memslots change; `None` if this enforcement needs no pause.
    pub(crate) fn pause(&self) -> Option<&Pause> {
        self.enforcement.pause()
    }

    /// The bytes of both sides.
    pub(crate) fn sides(&self) -> &Sides {
        &self.sides
    }

    /// The memslots, for messages.
    pub(crate) fn describe_slots(&self) -> String {
        let all = self.all();
        all.map_or_else(String::new, |all| self.enforcement.describe_slots(all))
    }

    // ---- states. They can change as soon as these return: only a range lock prevents that.

    /// The state of the page that holds `gpa`, which lies in memory.
    pub fn state(&self, gpa: u64) -> State {
        self.states.lock().map().state(gpa)
    }

    /// The state of all pages of a range that lies in memory, if they agree.
    pub fn uniform(&self, range: Range) -> Option<State> {
        self.states.lock().map().uniform(range)
    }

    /// "private", "shared" or "mixed".
    pub fn describe(&self, range: Range) -> &'static str {
        self.uniform(range).map_or("mixed", State::as_str)
    }

    /// Bytes that are private.
    pub fn private_bytes(&self) -> u64 {
        self.states.lock().map().private_bytes()
    }

    /// How many conversions changed something.
    pub fn generation(&self) -> u64 {
        self.states.lock().changes()
    }

    /// The states as they are now. Addresses in the hole are shared there.
    pub fn snapshot(&self) -> Snapshot {
        self.states.lock().snapshot()
    }

    /// All of memory as the fewest possible runs, ascending.
    ///
    /// # Errors
    /// ENOMEM: a guest can make as many runs as there are pages.
    pub fn runs(&self) -> Result<Vec<Run>, Errno> {
        self.all().map_or_else(|| Ok(Vec::new()), |all| self.runs_in(all))
    }

    /// The same of what of `range` is memory. From a snapshot, so that no vCPU waits while a long list is made.
    ///
    /// # Errors
    /// As [`GuestMemory::runs`].
    pub fn runs_in(&self, range: Range) -> Result<Vec<Run>, Errno> {
        let snapshot = self.snapshot();
        let ram = self.views.ram().into_iter().filter_map(|ram| ram.intersect(&range));
        Run::list(ram.flat_map(|ram| snapshot.runs_in(ram)))
    }

    /// The states of a range, to tell a policy.
    #[inline]
    pub(crate) fn see(&self, range: Range) -> Seen {
        self.states.lock().see(range)
    }

    // ---- faults

    /// A vCPU is about to enter the guest.
    #[inline]
    pub(crate) fn entry(&self) -> Entry {
        Entry {
            generation: self.states.generation(),
            slot_epoch: self.enforcement.slot_epoch(),
        }
    }

    /// What a fault is, after any conversion of its page is over; and how often the page changed since this vCPU began
    /// to fault on it.
    pub(crate) fn examine(&self, fault: &FaultingAccess, vcpu: u32) -> (FaultStatus, u64) {
        let mut states = self.states.access_when_free(fault.page);
        let status = self.status(fault, &states);
        let changes = states.watch(vcpu, fault.page.gpa());
        drop(states);
        if status != FaultStatus::Unexplained {
            return (status, changes);
        }
        // A memslot change that is in progress can have caused the fault too, so wait for it and compare then.
        self.enforcement.settle();
        match self.enforcement.slot_epoch() == fault.entry.slot_epoch {
            true => (FaultStatus::Unexplained, changes),
            false => (FaultStatus::Spurious, changes),
        }
    }

    /// What a fault is, by the page's state alone, without the memslots' epoch.
    pub(super) fn status(&self, fault: &FaultingAccess, states: &States) -> FaultStatus {
        let changed = states.changed_since(fault.page, fault.entry.generation);
        match (states.map().state(fault.page.gpa()) == fault.access, changed) {
            (true, false) => FaultStatus::Unexplained,
            (true, true) => FaultStatus::Spurious,
            // With one view, KVM took the accessed state from the page's attribute, perhaps before it changed.
            (false, true) if !self.views.split() => FaultStatus::Spurious,
            (false, _) => FaultStatus::Request,
        }
    }

    /// How often the page at `gpa` changed since this vCPU began to fault on it.
    pub(crate) fn watch(&self, vcpu: u32, gpa: u64) -> u64 {
        self.states.lock().watch(vcpu, gpa)
    }

    // ---- bytes

    /// Whether the host can reach the bytes of pages in this state.
    pub(crate) fn is_reachable(&self, state: State) -> bool {
        self.sides.of(state).is_reachable()
    }

    /// Does an access that KVM emulates: `data` is written to the page, or read from it. `false` if the page is not in
    /// the state of the view that was used.
    pub(crate) fn access_emulated(
        &self,
        place: Place,
        page: Range,
        write: bool,
        data: &mut [u8],
    ) -> Result<bool, Errno> {
        let (_held, states) = self.states.hold_and_access(page);
        let state = states.map().state(page.gpa());
        drop(states);
        if place.view.is_some_and(|view| view != state) && !self.unpaged.covers(page) {
            return Ok(false);
        }
        let side = self.sides.of(state);
        match write {
            true => side.write(place.gpa, data)?,
            false => side.read(place.gpa, data)?,
        }
        Ok(true)
    }

    /// Calls `copy` for each run of `[gpa, gpa + len)`, with the pages held.
    pub(crate) fn on_bytes(&self, gpa: u64, len: u64, seal: Seal, copy: Copy<'_>) -> Result<(), NoAccess> {
        let pages = self.pages(gpa, len).ok_or(NoAccess::Outside)?;
        let (_held, states) = self.states.hold_and_access(pages);
        let sealed = seal == Seal::Whole || !self.is_reachable(State::Private);
        let private = states.map().runs_in(pages).find(|run| run.state == State::Private);
        let runs = match private {
            Some(run) if sealed => return Err(NoAccess::Private(run.range.gpa())),
            _ => Run::list(states.map().runs_in(pages)).map_err(NoAccess::Failed)?,
        };
        drop(states);
        for run in runs {
            let (start, end) = (run.range.gpa().max(gpa), run.range.end().min(gpa + len));
            let part = (start - gpa) as usize..(end - gpa) as usize;
            copy(self.sides.of(run.state), start, part).map_err(NoAccess::Failed)?;
        }
        Ok(())
    }

    /// Frees pages, on the side of the state they are in; they read as zeroes then. Poisoned ones can be freed too.
    ///
    /// # Errors
    /// Those of fallocate(2), and ENOMEM.
    pub(crate) fn discard(&self, range: Range) -> Result<(), Errno> {
        let (_held, states) = self.states.hold_and_access(range);
        let runs = Run::list(states.map().runs_in(range))?;
        drop(states);
        runs.iter().try_for_each(|run| self.discard_side(run.state, run.range))
    }

    /// Frees the bytes that pages have on one side.
    #[inline]
    pub(super) fn discard_side(&self, state: State, range: Range) -> Result<(), Errno> {
        self.sides.of(state).forget_missing(range);
        self.free_side(state, range)
    }

    /// The same of memory that has no missing pages.
    #[inline]
    pub(super) fn free_side(&self, state: State, range: Range) -> Result<(), Errno> {
        self.hypervisor.punch_hole(&self.sides.of(state).part(range))
    }

    /// Resident bytes of both sides.
    pub(crate) fn resident(&self) -> Result<Resident, Errno> {
        let private = self.sides.private.resident()?;
        Ok(Resident {
            shared: self.sides.shared.resident()?.unwrap_or_default(),
            private: private.unwrap_or_else(|| self.private_bytes()),
            exact: private.is_some(),
        })
    }

    // ---- ranges

    /// From the first page to the last, with the hole.
    pub(super) fn all(&self) -> Option<Range> {
        Range::new(0, self.views.memory_end())
    }

    /// The pages that hold `[gpa, gpa + len)`, if all of them are memory.
    pub(crate) fn pages(&self, gpa: u64, len: u64) -> Option<Range> {
        Range::holding(gpa, len).filter(|range| self.views.holds(*range))
    }

    /// Validates a range of pages of this guest.
    pub(crate) fn range(&self, gpa: u64, size: u64) -> Result<Range, ConvertError> {
        let memory = self.size();
        let error = ConvertError::Range { gpa, size, memory };
        self.views.range(gpa, size).ok_or(error)
    }

    // ---- listeners

    /// Tells a listener the present states and then every change; it misses none.
    ///
    /// # Errors
    /// The listener's own, and `Closed`; then it did not join.
    pub(crate) fn join(&self, listener: Arc<dyn Listener>) -> Result<(), ConvertError> {
        let _held = self.all().map(|all| self.states.hold(all));
        if self.closed.load(Ordering::SeqCst) {
            return Err(ConvertError::Closed);
        }
        let runs = self.runs().map_err(|errno| Failure::from(std::io::Error::from(errno)));
        let joined = runs.and_then(|runs| self.listeners.join(listener, &runs));
        joined.map_err(ConvertError::Listener)
    }

    /// Tells listeners that failed the present states of the pages that they failed for, as long as `go_on` says so, which is
    /// asked before each of them is told and some forty times a second while pages are waited for.
    ///
    /// # Errors
    /// A listener's own; it is told again later.
    pub(crate) fn tell_listeners_again(&self, go_on: &mut dyn FnMut() -> bool) -> Result<(), Failure> {
        self.listeners.untold().ranges().iter().try_for_each(|range| {
            let range = *range;
            let Some(_held) = self.states.hold_while(range, LOOK_AGAIN, go_on) else {
                return Ok(());
            };
            let present = |pages| self.states.lock().runs_in(pages);
            self.listeners.present().tell_again(range, &present)
        })
    }

    /// Removes a listener; returns whether it was there. It is told nothing more, unless it is removed from inside of a
    /// listener: then the conversion under way is still told to its end.
    pub(crate) fn leave(&self, listener: &Arc<dyn Listener>) -> bool {
        let all = self.all().filter(|_| !listeners::inside());
        let _held = all.map(|all| self.states.hold(all));
        self.listeners.leave(listener)
    }

    /// Lets no further conversion begin, waits for those under way, and removes all listeners. Must not be called from
    /// inside of a listener, for whose conversion it would wait.
    pub(crate) fn end_conversions(&self) {
        self.closed.store(true, Ordering::SeqCst);
        // A conversion reads this when it has its pages, so those that do not see it are waited for.
        self.frozen.store(true, Ordering::SeqCst);
        let held = self.all().map(|all| self.states.hold(all));
        drop(held);
        self.listeners.clear();
    }
}

fn not_set_up(failure: NotEnforced) -> Error {
    match failure {
        NotEnforced::NoSlots(out) => Error::NotSupported(format!(
            "this host has {} memslots and {} are needed: use fewer parts",
            out.available, out.needed
        )),
        NotEnforced::Kernel { errno, .. } => Error::Host {
            what: "give the guest its memory",
            errno,
        },
    }
}
