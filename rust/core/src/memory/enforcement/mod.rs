//! Makes KVM enforce the states of pages: by memory attributes, by memslots, or by both where there are two views.

mod attributes;
mod failure;
mod pause;
mod slot_table;
mod slots;

use std::sync::Arc;

pub(crate) use failure::{Before, NotEnforced};
pub(crate) use pause::Pause;

use self::attributes::Attributes;
use self::slots::{PRIVATE_LAYER, SHARED_LAYER, Slots};
use super::address::{PAGE_SIZE, Range, Run, State};
use super::backing::Sides;
use super::views::Views;
use crate::hypervisor::host::EnforcementMode;
use crate::hypervisor::vm::Hypervisor;

/// The most bytes of one transaction, and the most memslots of a layer in it.
const PART: u64 = 256 << 20;
const PART_SLOTS: usize = 64;

pub(crate) struct Enforcement {
    mode: EnforcementMode,
    views: Views,
    attributes: Attributes,
    slots: Slots,
}

impl Enforcement {
    /// `borders`: addresses that no memslot crosses, ascending.
    pub(super) fn new(
        mode: EnforcementMode,
        hypervisor: Arc<dyn Hypervisor>,
        sides: Arc<Sides>,
        views: Views,
        borders: Vec<u64>,
    ) -> Self {
        let both_sides = mode == EnforcementMode::Attributes && !views.split();
        let pause = mode == EnforcementMode::Memslots;
        Self {
            mode,
            views,
            attributes: Attributes(hypervisor.clone()),
            slots: Slots::new(hypervisor, sides, views, borders, both_sides, pause),
        }
    }

    pub(crate) fn mode(&self) -> EnforcementMode {
        self.mode
    }

    /// The pause that keeps vCPUs out of the guest while memslots change; `None` where they need not be.
    pub(crate) fn pause(&self) -> Option<&Pause> {
        self.slots.pause()
    }

    /// A counter of memslot changes; see [`Slots::epoch`].
    #[inline]
    pub(super) fn slot_epoch(&self) -> u64 {
        self.slots.epoch()
    }

    /// Waits until no memslot change is under way.
    pub(super) fn settle(&self) {
        self.slots.settle();
    }

    /// The memslots of `range`, for messages.
    pub(super) fn describe_slots(&self, range: Range) -> String {
        self.slots.describe(range)
    }

    /// Whether the attribute alone decides which side of a page KVM maps, so that conversions change no memslot.
    fn attributes_alone(&self) -> bool {
        self.mode == EnforcementMode::Attributes && !self.views.split()
    }

    /// Gives the VM its first memslots and attributes: all of memory in state `initial`.
    pub(super) fn start(&self, all: Range, initial: State) -> Result<(), NotEnforced> {
        let before = Before::all_of(State::Shared);
        if self.mode == EnforcementMode::Memslots {
            let layer = match initial {
                State::Shared => SHARED_LAYER,
                State::Private => PRIVATE_LAYER,
            };
            return self.slots.change(all, &[(layer, true)]);
        }
        self.slots.change(all, &[(SHARED_LAYER, true)])?;
        if self.views.split() {
            // Private views always have PRIVATE set. Whether a page is in its private view depends on the memslot
            // there.
            self.attributes.set(all, State::Private, before)?;
        }
        match initial {
            State::Shared => Ok(()),
            State::Private => self.apply(all, State::Private, before),
        }
    }

    /// Whether one transaction is enough for `range`, as far as can be told without the memslot table.
    #[inline]
    pub(super) fn is_one_part(&self, range: Range) -> bool {
        range.size() <= PAGE_SIZE || range.size() <= PART && self.attributes_alone()
    }

    /// The first part of `range` that one transaction converts. Between parts a conversion can be cancelled, so a run
    /// that ends does not wait for the whole range.
    pub(super) fn part(&self, range: Range) -> Range {
        if self.is_one_part(range) {
            return range;
        }
        let end = match self.attributes_alone() {
            true => range.end(),
            false => self.slots.end_of_first(PART_SLOTS, range),
        };
        let size = (end - range.gpa()).min(PART);
        Range::new(range.gpa(), size).unwrap_or(range)
    }

    /// Makes KVM enforce `to` on all of `range`. What was done before a failure is undone.
    #[inline]
    pub(super) fn apply(&self, range: Range, to: State, before: Before<'_>) -> Result<(), NotEnforced> {
        match self.attributes_alone() {
            true => self.attributes.set(range, to, before),
            false => self.apply_by_slots(range, to, before),
        }
    }

    /// By memslots alone, or with two views by the shared view's attribute and the private view's memslot.
    fn apply_by_slots(&self, range: Range, to: State, before: Before<'_>) -> Result<(), NotEnforced> {
        let private = to == State::Private;
        if self.mode == EnforcementMode::Memslots {
            let changes = [(SHARED_LAYER, !private), (PRIVATE_LAYER, private)];
            return self.slots.change(range, &changes);
        }
        let shared_view = |range: Range| self.views.view(range, State::Shared);
        let runs = |view: Range| -> Vec<Run> {
            let page = |gpa: u64| gpa & !self.views.shared_mask();
            let runs = Range::new(page(view.gpa()), view.size())
                .map(|range| before.runs(range))
                .unwrap_or_default();
            let in_view = |run: Run| Run {
                range: shared_view(run.range),
                ..run
            };
            runs.into_iter().map(in_view).collect()
        };
        let before = Before { runs: &runs, ..before };
        self.attributes.set(shared_view(range), to, before)?;
        let changed = self.slots.change(range, &[(PRIVATE_LAYER, private)]);
        changed.map_err(|failure| failure.with_undo(self.attributes.restore(shared_view(range), before)))
    }
}
