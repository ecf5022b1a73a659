//! Making KVM enforce a page's state: by memory attributes, or by memslots.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::attributes::{PAGE_SIZE, Range, Run, State};
use crate::errno::Errno;
use crate::hypervisor::{Hypervisor, Memslot};
use crate::kick::Kick;
use crate::memory::GuestMemory;
use crate::slots::{Layer, LayerChange, OutOfSlots, Plan, Slot, SlotTable};
use crate::views::Views;
use crate::world::World;

/// How a page's state is enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// KVM_SET_MEMORY_ATTRIBUTES and guest_memfd slots.
    Attributes,
    /// Slots over host memory and slots over private memory, swapped.
    Memslots,
}

impl Mode {
    /// "attributes" or "memslots".
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Attributes => "attributes",
            Mode::Memslots => "memslots",
        }
    }
}

/// One KVM_SET_MEMORY_ATTRIBUTES call, and one discard, is bounded by this many bytes: neither can be interrupted, and
/// both hold every vCPU that faults in their range.
pub(crate) const CHUNK: u64 = 2 << 20;

/// One transaction is for at most this many bytes, and this many slots of a layer.
const PART: u64 = 256 << 20;
const PART_SLOTS: usize = 64;

/// Why KVM does not enforce what was asked.
pub(crate) enum Failure {
    NoSlots(OutOfSlots),
    Kernel { errno: Errno, undo: Result<(), Errno> },
}

/// The state of a range's pages before they are converted.
#[derive(Clone, Copy)]
pub(crate) struct Before<'a> {
    /// Of all of them, if they agree.
    pub uniform: Option<State>,
    /// Else of any part of the range.
    pub mixed: &'a dyn Fn(Range) -> Vec<Run>,
}

impl Before<'_> {
    /// All pages of whatever range.
    fn all_of(state: State) -> Self {
        Self {
            uniform: Some(state),
            mixed: &|_| Vec::new(),
        }
    }

    pub(crate) fn runs(&self, range: Range) -> Vec<Run> {
        match self.uniform {
            Some(state) => vec![Run { range, state }],
            None => (self.mixed)(range),
        }
    }

    fn all(&self, range: Range, state: State) -> bool {
        match self.uniform {
            Some(uniform) => uniform == state,
            None => (self.mixed)(range).iter().all(|run| run.state == state),
        }
    }
}

pub(crate) struct Enforcement {
    mode: Mode,
    vm: Arc<dyn Hypervisor>,
    memory: Arc<GuestMemory>,
    views: Views,
    slots: Mutex<SlotTable>,
    /// Counts slot changes, begun and ended: a fault that met one in between says nothing.
    epoch: AtomicU64,
    world: Option<World>,
    /// Bytes of a range for which one transaction is enough wherever it lies.
    surely_one_part: u64,
}

const SHARED_LAYER: usize = 0;
const PRIVATE_LAYER: usize = 1;

impl Enforcement {
    pub(crate) fn new(
        mode: Mode,
        vm: Arc<dyn Hypervisor>,
        memory: Arc<GuestMemory>,
        views: Views,
        borders: Vec<u64>,
    ) -> Self {
        let shared = Layer {
            side: State::Shared,
            both_sides: mode == Mode::Attributes && !views.split(),
        };
        let private = Layer {
            side: State::Private,
            both_sides: false,
        };
        let slots = SlotTable::new(&[shared, private], borders, vm.limits().memslots);
        Self {
            mode,
            vm,
            memory,
            views,
            slots: Mutex::new(slots),
            epoch: AtomicU64::new(0),
            world: (mode == Mode::Memslots).then(World::default),
            surely_one_part: match mode {
                Mode::Attributes if !views.split() => PART,
                _ => PAGE_SIZE,
            },
        }
    }

    pub(crate) fn mode(&self) -> Mode {
        self.mode
    }

    /// Where vCPUs wait while slots change, if they have to.
    pub(crate) fn world(&self) -> Option<&World> {
        self.world.as_ref()
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Waits until no slot is being changed.
    pub(crate) fn settled(&self) {
        drop(self.slots.lock());
    }

    /// The slots under `range`, for messages.
    pub(crate) fn describe_slots(&self, range: Range) -> String {
        let slots = self.slots.lock().find(range);
        let names: Vec<String> = slots
            .iter()
            .map(|slot| format!("slot {} {}", slot.id, self.address(slot)))
            .collect();
        match names.len() {
            0 => "no slot".to_owned(),
            1..=4 => names.join(" or "),
            n => format!("{} or one of {} more", names[..3].join(", "), n - 3),
        }
    }

    /// Sets up all of memory in `initial`.
    pub(crate) fn start(&self, all: Range, initial: State) -> Result<(), Failure> {
        let before = Before::all_of(State::Shared);
        match self.mode {
            Mode::Attributes => {
                self.change_slots(all, &[(SHARED_LAYER, true)], &[])?;
                if self.views.split() {
                    // Private views carry PRIVATE for good; whether a page is in that view is a matter of its slot.
                    self.set_attributes(all, State::Private, before)?;
                }
                match initial {
                    State::Shared => Ok(()),
                    State::Private => self.apply_in_calls(all, State::Private, &[], before),
                }
            }
            Mode::Memslots => {
                let layer = match initial {
                    State::Shared => SHARED_LAYER,
                    State::Private => PRIVATE_LAYER,
                };
                self.change_slots(all, &[(layer, true)], &[])
            }
        }
    }

    /// Whether one transaction is enough for `range`, as far as can be told at once.
    #[inline(always)]
    pub(crate) fn is_one_part(&self, range: Range) -> bool {
        range.size() <= self.surely_one_part
    }

    /// The part of `range`, from its start, that one transaction is for: so much that a run which ends need not wait
    /// for more.
    pub(crate) fn part(&self, range: Range) -> Range {
        if self.is_one_part(range) {
            return range;
        }
        let end = match self.mode {
            Mode::Attributes if !self.views.split() => range.end(),
            _ => self.slots.lock().reach(range, PART_SLOTS),
        };
        let size = (end - range.gpa()).min(PART);
        Range::new(range.gpa(), size).unwrap_or(range)
    }

    /// Makes KVM enforce `to` on all of `range`. What was done before a failure is undone.
    #[inline(always)]
    pub(crate) fn apply(
        &self,
        range: Range,
        to: State,
        vcpus: &[Arc<Kick>],
        uniform: Option<State>,
        mixed: &dyn Fn(Range) -> Vec<Run>,
    ) -> Result<(), Failure> {
        let one_call = range.gpa() / CHUNK == (range.end() - 1) / CHUNK && uniform == Some(to.other());
        if !one_call || self.mode != Mode::Attributes || self.views.split() {
            return self.apply_in_calls(range, to, vcpus, Before { uniform, mixed });
        }
        match self.vm.set_attributes(range, to) {
            Ok(()) => Ok(()),
            Err(errno) => Err(self.not_set(range, errno, Before { uniform, mixed })),
        }
    }

    #[inline(never)]
    fn apply_in_calls(&self, range: Range, to: State, vcpus: &[Arc<Kick>], before: Before<'_>) -> Result<(), Failure> {
        match (self.mode, self.views.split()) {
            (Mode::Attributes, false) => self.set_attributes(range, to, before),
            _ => self.apply_by_slots(range, to, vcpus, before),
        }
    }

    fn apply_by_slots(&self, range: Range, to: State, vcpus: &[Arc<Kick>], before: Before<'_>) -> Result<(), Failure> {
        let private = to == State::Private;
        if self.mode == Mode::Memslots {
            let changes = [(SHARED_LAYER, !private), (PRIVATE_LAYER, private)];
            return self.change_slots(range, &changes, vcpus);
        }
        let shared_view = |range: Range| self.views.view(range, State::Shared);
        let runs = |view: Range| -> Vec<Run> {
            let page = |gpa: u64| gpa & !self.views.shared_mask();
            let runs = Range::new(page(view.gpa()), view.size())
                .map(|range| before.runs(range))
                .unwrap_or_default();
            let seen = |run: Run| Run {
                range: shared_view(run.range),
                ..run
            };
            runs.into_iter().map(seen).collect()
        };
        let before = Before { mixed: &runs, ..before };
        self.set_attributes(shared_view(range), to, before)?;
        self.change_slots(range, &[(PRIVATE_LAYER, private)], vcpus)
            .map_err(|failure| {
                let undone = self.restore(shared_view(range), before);
                failure.and_undo(undone)
            })
    }

    fn set_attributes(&self, range: Range, to: State, before: Before<'_>) -> Result<(), Failure> {
        for chunk in chunks(range) {
            if before.all(chunk, to) {
                continue;
            }
            if let Err(errno) = self.vm.set_attributes(chunk, to) {
                let done = Range::new(range.gpa(), chunk.end() - range.gpa()).unwrap_or(range);
                return Err(self.not_set(done, errno, before));
            }
        }
        Ok(())
    }

    /// The last call for `done` failed, whose part of it may have been done.
    #[cold]
    fn not_set(&self, done: Range, errno: Errno, before: Before<'_>) -> Failure {
        let undo = self.restore(done, before);
        Failure::Kernel { errno, undo }
    }

    fn restore(&self, range: Range, before: Before<'_>) -> Result<(), Errno> {
        for chunk in chunks(range) {
            for run in before.runs(chunk) {
                self.vm.set_attributes(run.range, run.state)?;
            }
        }
        Ok(())
    }

    fn change_slots(&self, range: Range, changes: &[LayerChange], vcpus: &[Arc<Kick>]) -> Result<(), Failure> {
        let mut table = self.slots.lock();
        let plan = table.plan(range, changes).map_err(Failure::NoSlots)?;
        let _outside = self.world.as_ref().map(|world| world.pause(vcpus));
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let done = self.execute(&table, &plan);
        if done.is_ok() {
            table.commit(plan);
        }
        self.epoch.fetch_add(1, Ordering::SeqCst);
        done
    }

    fn execute(&self, table: &SlotTable, plan: &Plan) -> Result<(), Failure> {
        let delete = |slot: &Slot| self.vm.delete_memslot(slot.id);
        let create = |slot: &Slot| self.create(table.layer(slot.layer), slot);
        for (i, slot) in plan.delete.iter().enumerate() {
            if let Err(errno) = delete(slot) {
                let undo = plan.delete[..i].iter().rev().try_for_each(create);
                return Err(Failure::Kernel { errno, undo });
            }
        }
        for (i, slot) in plan.create.iter().enumerate() {
            if let Err(errno) = create(slot) {
                let undo = plan.create[..i].iter().rev().try_for_each(delete);
                let undo = undo.and_then(|()| plan.delete.iter().rev().try_for_each(create));
                return Err(Failure::Kernel { errno, undo });
            }
        }
        Ok(())
    }

    fn address(&self, slot: &Slot) -> Range {
        let side = match slot.layer {
            PRIVATE_LAYER => State::Private,
            _ => State::Shared,
        };
        self.views.view(slot.range, side)
    }

    fn create(&self, layer: Layer, slot: &Slot) -> Result<(), Errno> {
        let at = slot.range.gpa();
        let (private, shared) = (&self.memory.private, &self.memory.shared);
        let host = match layer.side {
            State::Shared => shared.host(at),
            State::Private => private.host(at),
        };
        let guest_memfd = match layer {
            Layer { both_sides: true, .. }
            | Layer {
                side: State::Private, ..
            } => private.as_guest_memfd(),
            _ => None,
        };
        self.vm.create_memslot(&Memslot {
            id: slot.id,
            range: self.address(slot),
            host,
            guest_memfd: guest_memfd.map(|fd| (fd, at)),
        })
    }
}

impl Failure {
    /// The failure of a later step, after the earlier ones were undone with this result.
    fn and_undo(self, earlier: Result<(), Errno>) -> Self {
        match (self, earlier) {
            (Failure::NoSlots(_), Err(undo)) => Failure::Kernel {
                errno: Errno(libc::ENOSPC),
                undo: Err(undo),
            },
            (Failure::Kernel { errno, undo }, earlier) => Failure::Kernel {
                errno,
                undo: undo.and(earlier),
            },
            (failure, Ok(())) => failure,
        }
    }
}

/// `range`, cut at multiples of [`CHUNK`].
pub(crate) fn chunks(range: Range) -> impl Iterator<Item = Range> {
    let mut start = range.gpa();
    std::iter::from_fn(move || {
        let end = (start - start % CHUNK + CHUNK).min(range.end());
        let chunk = Range::new(start, end.checked_sub(start)?)?;
        start = end;
        Some(chunk)
    })
}
