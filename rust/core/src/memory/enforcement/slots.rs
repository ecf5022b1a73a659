//! Memslots: changes which pages of each view have one, by the plan of the memslot table.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::failure::NotEnforced;
use super::pause::Pause;
use super::slot_table::{Layer, LayerChange, Plan, Slot, SlotTable};
use crate::errno::Errno;
use crate::error::Failure;
use crate::hypervisor::vm::{Hypervisor, Memslot};
use crate::input::Watch;
use crate::memory::address::{Range, State};
use crate::memory::backing::Sides;
use crate::memory::views::Views;

/// The layer of the shared views. With attributes and one view, of all memory.
pub(super) const SHARED_LAYER: usize = 0;
/// The layer of the private views. With memslots and one view, both layers are at the same addresses.
pub(super) const PRIVATE_LAYER: usize = 1;
/// The layer of shared views over private memory, see `unpaged.rs`.
pub(super) const UNPAGED_LAYER: usize = 2;

pub(super) struct Slots {
    hypervisor: Arc<dyn Hypervisor>,
    sides: Arc<Sides>,
    views: Views,
    table: Mutex<SlotTable>,
    /// Counts the beginnings and the ends of memslot changes. While one is under way, a fault says nothing about its
    /// page's state.
    epoch: AtomicU64,
    /// Keeps vCPUs out of the guest while memslots change; `None` where they need not be.
    pause: Option<Pause>,
}

impl Slots {
    /// `both_sides`: the memslots of the shared layer have a guest_memfd besides host memory. `pause`: vCPUs are kept
    /// out of the guest while memslots change.
    pub(super) fn new(
        hypervisor: Arc<dyn Hypervisor>,
        sides: Arc<Sides>,
        views: Views,
        borders: Vec<u64>,
        both_sides: bool,
        pause: bool,
    ) -> Self {
        let layer = |view, side| Layer {
            view,
            side,
            both_sides: false,
        };
        let shared = Layer {
            both_sides,
            ..layer(State::Shared, State::Shared)
        };
        let private = layer(State::Private, State::Private);
        let unpaged = layer(State::Shared, State::Private);
        let table = SlotTable::new(&[shared, private, unpaged], borders, hypervisor.capabilities().memslots);
        Self {
            hypervisor,
            sides,
            views,
            table: Mutex::new(table),
            epoch: AtomicU64::new(0),
            pause: pause.then(Pause::default),
        }
    }

    pub(super) fn pause(&self) -> Option<&Pause> {
        self.pause.as_ref()
    }

    /// A counter that changes when a memslot change begins, and when it ends.
    #[inline]
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Waits until no memslot change is under way.
    pub(super) fn settle(&self) {
        drop(self.table.lock());
    }

    /// The end of the longest first part of `range` that overlaps at most `max` memslots of each layer.
    pub(super) fn end_of_first(&self, max: usize, range: Range) -> u64 {
        self.table.lock().end_of_first(max, range)
    }

    /// The memslots of `range`, for messages.
    pub(super) fn describe(&self, range: Range) -> String {
        let table = self.table.lock();
        let slots = table.find(range);
        let name = |slot: &Slot| {
            format!(
                "slot {} {}",
                slot.id,
                self.views.view(slot.range, table.layer(slot.layer).view)
            )
        };
        let names: Vec<String> = slots.iter().map(name).collect();
        match names.len() {
            0 => "no slot".to_owned(),
            1..=4 => names.join(" or "),
            n => format!("{} or one of {} more", names[..3].join(", "), n - 3),
        }
    }

    /// Creates or deletes the memslots of `range` in each of these layers. What was done before a failure is undone.
    pub(super) fn change(&self, range: Range, changes: &[LayerChange]) -> Result<(), NotEnforced> {
        let mut table = self.table.lock();
        let plan = table.plan(range, changes).map_err(NotEnforced::NoSlots)?;
        let _paused = self.pause.as_ref().map(Pause::pause);
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let done = self.execute(&table, &plan);
        if done.is_ok() {
            table.commit(plan);
        }
        self.epoch.fetch_add(1, Ordering::SeqCst);
        done
    }

    /// Creates the first memslots of `range`, when there is no vCPU. Where KVM shadows page tables this takes it seconds for
    /// each TiB: it allocates eight bytes for each page. So `watch` is called before each. What was done before a failure
    /// is left for the end of the VM.
    pub(super) fn start(
        &self,
        range: Range,
        changes: &[LayerChange],
        watch: &mut Watch<'_>,
    ) -> Result<Result<(), NotEnforced>, Failure> {
        let plan = match self.table.lock().plan(range, changes) {
            Ok(plan) => plan,
            Err(out) => return Ok(Err(NotEnforced::NoSlots(out))),
        };
        for slot in &plan.create {
            watch()?;
            let layer = self.table.lock().layer(slot.layer);
            if let Err(errno) = self.create(layer, slot) {
                let undo = Ok(());
                return Ok(Err(NotEnforced::Kernel { errno, undo }));
            }
        }
        self.table.lock().commit(plan);
        Ok(Ok(()))
    }

    /// Calls KVM for a plan, and undoes it after a failure.
    fn execute(&self, table: &SlotTable, plan: &Plan) -> Result<(), NotEnforced> {
        let delete = |slot: &Slot| self.hypervisor.delete_memslot(slot.id);
        let create = |slot: &Slot| self.create(table.layer(slot.layer), slot);
        for (i, slot) in plan.delete.iter().enumerate() {
            if let Err(errno) = delete(slot) {
                let undo = plan.delete[..i].iter().rev().try_for_each(create);
                return Err(NotEnforced::Kernel { errno, undo });
            }
        }
        for (i, slot) in plan.create.iter().enumerate() {
            if let Err(errno) = create(slot) {
                let undo = plan.create[..i].iter().rev().try_for_each(delete);
                let undo = undo.and_then(|()| plan.delete.iter().rev().try_for_each(create));
                return Err(NotEnforced::Kernel { errno, undo });
            }
        }
        Ok(())
    }

    fn create(&self, layer: Layer, slot: &Slot) -> Result<(), Errno> {
        let at = slot.range.gpa();
        let guest_memfd = match layer.both_sides || layer.side == State::Private {
            true => self.sides.private.as_guest_memfd(),
            false => None,
        };
        let address = self.views.view(slot.range, layer.view);
        self.hypervisor.create_memslot(&Memslot {
            id: slot.id,
            gpa: address.gpa(),
            size: address.size(),
            host: self.sides.of(layer.side).host(at),
            guest_memfd: guest_memfd.map(|fd| (fd, at)),
        })
    }
}
