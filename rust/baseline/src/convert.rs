//! A conversion: makes KVM enforce the new state, and discards the old side.

use std::io;
use std::sync::{MutexGuard, PoisonError};

use crate::pages::Pages;
use crate::plan::{Mode, Work};
use crate::slots::{Slot, Slots};
use crate::vm::BareVm;

/// The most bytes of one KVM_SET_MEMORY_ATTRIBUTES, so that other vCPUs do not wait for it for long.
const ATTRIBUTES_AT_ONCE: u64 = 2 << 20;

impl BareVm {
    pub(crate) fn convert(&self, pages: Pages, private: bool) -> io::Result<()> {
        if self.plan.work == Work::Nothing {
            return Ok(());
        }
        let emulation_writes = match self.plan.mode {
            Mode::Attributes => !private,
            Mode::Traps => true,
            Mode::Memslots => false,
        };
        if self.plan.work == Work::All && emulation_writes {
            self.clean(pages, private)?;
        }
        match (self.plan.mode, self.plan.shared_bit) {
            (Mode::Attributes, None) => self.set_in_parts(pages, private)?,
            (Mode::Attributes, Some(_)) => {
                self.set_in_parts(self.view(pages, false)?, private)?;
                self.private_slot(pages, private)?;
            }
            // First the view that the pages leave, so that they are in neither for a moment.
            (Mode::Traps, _) => {
                self.set_in_parts(self.view(pages, !private)?, true)?;
                self.set_in_parts(self.view(pages, private)?, false)?;
            }
            (Mode::Memslots, _) => self.replace_slots(pages, private)?,
        }
        match self.plan.work {
            Work::Discard | Work::All => self.discard(pages, !private),
            Work::Nothing | Work::Enforce => Ok(()),
        }
    }

    fn view(&self, pages: Pages, private: bool) -> io::Result<Pages> {
        Pages::new(self.views.address(pages.start, private), pages.size())
    }

    fn set_in_parts(&self, pages: Pages, private: bool) -> io::Result<()> {
        let mut start = pages.start;
        while start < pages.end {
            let end = (start - start % ATTRIBUTES_AT_ONCE + ATTRIBUTES_AT_ONCE).min(pages.end);
            self.set_attributes(Pages { start, end }, private)?;
            start = end;
        }
        Ok(())
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// With attributes and two views, a private page has a memslot at its private view, and a shared one has none
    /// there.
    fn private_slot(&self, pages: Pages, private: bool) -> io::Result<()> {
        let mut slots = self.slots();
        match (private, slots.around(pages.start)) {
            (true, None) => {
                let id = slots.take().ok_or(io::ErrorKind::StorageFull)?;
                self.create_slot(id, pages, true)?;
                let end = pages.end;
                slots.at.insert(pages.start, Slot { end, id, private });
                Ok(())
            }
            (false, Some((start, slot))) if (start, slot.end) == (pages.start, pages.end) => {
                self.delete_slot(slot.id)?;
                slots.remove(start);
                Ok(())
            }
            _ => Err(unexpected("conversions that overlap")),
        }
    }

    /// Takes the pages out of their memslot, and joins them with adjacent memslots of the new state.
    fn replace_slots(&self, pages: Pages, private: bool) -> io::Result<()> {
        let mut slots = self.slots();
        let (outer_start, outer) = match slots.around(pages.start) {
            Some((_, slot)) if slot.private == private => return Ok(()),
            Some((start, slot)) if pages.end <= slot.end => (start, slot),
            _ => return Err(unexpected("a conversion across memslots")),
        };
        let joins = |slot: &(u64, Slot)| slot.1.private == private;
        let part = slots.part;
        let below = (pages.start == outer_start && !pages.start.is_multiple_of(part))
            .then(|| slots.around(pages.start - 1))
            .flatten()
            .filter(joins);
        let above = (pages.end == outer.end && !pages.end.is_multiple_of(part))
            .then(|| slots.around(pages.end))
            .flatten()
            .filter(joins);
        let start = below.map_or(pages.start, |(start, _)| start);
        let end = above.map_or(pages.end, |(_, slot)| slot.end);
        for (start, slot) in [Some((outer_start, outer)), below, above].into_iter().flatten() {
            self.delete_slot(slot.id)?;
            slots.remove(start);
        }
        let rest = [
            (outer_start, pages.start, outer.private),
            (pages.end, outer.end, outer.private),
        ];
        for (start, end, private) in rest.into_iter().chain([(start, end, private)]) {
            if start == end {
                continue;
            }
            let id = slots.take().ok_or(io::ErrorKind::StorageFull)?;
            self.create_slot(id, Pages { start, end }, private)?;
            slots.at.insert(start, Slot { end, id, private });
        }
        Ok(())
    }
}

/// An error for what the baseline does not handle.
pub(crate) fn unexpected(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the bare loop does not handle {what}"),
    )
}
