//! Makes KVM enforce the states of pages: by memory attributes, by memslots, or by both where there are two views.

mod attributes;
mod failure;
mod pause;
mod slot_table;
mod slots;
mod unpaged;

use std::sync::Arc;

pub(crate) use failure::{Before, NotEnforced};
pub(crate) use pause::Pause;

use self::attributes::{Attributes, ViewAttributes};
use self::slots::{PRIVATE_LAYER, SHARED_LAYER, Slots};
use super::address::{PAGE_SIZE, Range, State};
use super::backing::Sides;
use super::views::Views;
use crate::error::Failure;
use crate::hypervisor::host::EnforcementMode;
use crate::hypervisor::vm::Hypervisor;
use crate::input::Watch;

/// The most bytes of one transaction, and the most memslots of a layer in it.
const PART: u64 = 256 << 20;
const PART_SLOTS: usize = 64;
/// How many bytes get their first attributes between two calls of the watch. KVM stores a word for each page.
const STARTED_AT_ONCE: u64 = 64 << 30;

/// Whether a page's shared view carries PRIVATE: while the page is private. An access there is a memory fault then,
/// because the memslot has no guest_memfd. With one view it says which side KVM maps.
const SHARED_VIEW: ViewAttributes = ViewAttributes {
    view: State::Shared,
    private_in: State::Private,
};
/// Under traps the private view is treated alike: it carries PRIVATE while the page is shared.
const TRAPPED_PRIVATE_VIEW: ViewAttributes = ViewAttributes {
    view: State::Private,
    private_in: State::Shared,
};
/// Under attributes the private view always carries PRIVATE. Whether a page is in it depends on the memslot there.
const PRIVATE_VIEW: ViewAttributes = ViewAttributes {
    view: State::Private,
    private_in: State::Private,
};

pub(crate) struct Enforcement {
    mode: EnforcementMode,
    views: Views,
    sides: Arc<Sides>,
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
            attributes: Attributes {
                hypervisor: hypervisor.clone(),
                views,
            },
            slots: Slots::new(hypervisor, sides.clone(), views, borders, both_sides, pause),
            sides,
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

    /// Whether attributes alone decide what an access meets, so that conversions change no memslot.
    fn attributes_alone(&self) -> bool {
        match self.mode {
            EnforcementMode::Attributes => !self.views.split(),
            EnforcementMode::Traps => true,
            EnforcementMode::Memslots => false,
        }
    }

    /// Gives the VM its first memslots and attributes for a range of memory: all of it in state `initial`. Fails if
    /// `watch` does, which is called again and again.
    pub(super) fn start(
        &self,
        ram: Range,
        initial: State,
        watch: &mut Watch<'_>,
    ) -> Result<Result<(), NotEnforced>, Failure> {
        let layers: &[_] = match (self.mode, initial) {
            (EnforcementMode::Memslots, State::Private) => &[(PRIVATE_LAYER, true)],
            (EnforcementMode::Traps, _) => &[(SHARED_LAYER, true), (PRIVATE_LAYER, true)],
            _ => &[(SHARED_LAYER, true)],
        };
        if let Err(failure) = self.slots.start(ram, layers, watch)? {
            return Ok(Err(failure));
        }
        let mut start = ram.gpa();
        while let Some(part) = Range::new(start, (ram.end() - start).min(STARTED_AT_ONCE)) {
            watch()?;
            if let Err(failure) = self.start_attributes(part, initial) {
                return Ok(Err(failure));
            }
            start = part.end();
        }
        Ok(Ok(()))
    }

    fn start_attributes(&self, part: Range, initial: State) -> Result<(), NotEnforced> {
        match self.mode {
            EnforcementMode::Memslots => Ok(()),
            EnforcementMode::Traps => {
                // No page carries PRIVATE yet, in either view.
                let view = match initial {
                    State::Shared => TRAPPED_PRIVATE_VIEW,
                    State::Private => SHARED_VIEW,
                };
                self.attributes
                    .set(view, part, initial, Before::all_of(initial.other()))
            }
            EnforcementMode::Attributes => {
                let before = Before::all_of(State::Shared);
                if self.views.split() {
                    self.attributes.set(PRIVATE_VIEW, part, State::Private, before)?;
                }
                match initial {
                    State::Shared => Ok(()),
                    State::Private => self.apply(part, State::Private, before),
                }
            }
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
    #[inline(always)]
    pub(super) fn apply(&self, range: Range, to: State, before: Before<'_>) -> Result<(), NotEnforced> {
        match self.mode {
            EnforcementMode::Attributes if !self.views.split() => self.attributes.set(SHARED_VIEW, range, to, before),
            EnforcementMode::Attributes => self.apply_by_attribute_and_memslot(range, to, before),
            EnforcementMode::Traps => self.apply_by_traps(range, to, before),
            EnforcementMode::Memslots => self.apply_by_memslots(range, to),
        }
    }

    // Not inlined, so that `apply` is small enough to be.

    #[inline(never)]
    fn apply_by_memslots(&self, range: Range, to: State) -> Result<(), NotEnforced> {
        let private = to == State::Private;
        let changes = [(SHARED_LAYER, !private), (PRIVATE_LAYER, private)];
        self.slots.change(range, &changes)
    }

    /// With two views by the shared view's attribute and the private view's memslot.
    #[inline(never)]
    fn apply_by_attribute_and_memslot(&self, range: Range, to: State, before: Before<'_>) -> Result<(), NotEnforced> {
        self.attributes.set(SHARED_VIEW, range, to, before)?;
        let changed = self.slots.change(range, &[(PRIVATE_LAYER, to == State::Private)]);
        changed.map_err(|failure| failure.with_undo(self.attributes.restore(SHARED_VIEW, range, before)))
    }

    /// Traps the view that the pages leave, and then opens the one that they are in from now on: in between every access
    /// faults, and is found to be spurious.
    #[inline(never)]
    fn apply_by_traps(&self, range: Range, to: State, before: Before<'_>) -> Result<(), NotEnforced> {
        let (left, entered) = match to {
            State::Private => (SHARED_VIEW, TRAPPED_PRIVATE_VIEW),
            State::Shared => (TRAPPED_PRIVATE_VIEW, SHARED_VIEW),
        };
        self.attributes.set(left, range, to, before)?;
        let opened = self.attributes.set(entered, range, to, before);
        opened.map_err(|failure| failure.with_undo(self.attributes.restore(left, range, before)))
    }
}
