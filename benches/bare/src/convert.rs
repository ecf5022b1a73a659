//! A conversion: make KVM enforce it, discard the stale side.

use std::io;
use std::sync::PoisonError;

use pagegate_core::attributes::{Range, State};

use crate::slots::{Slot, Slots};
use crate::vm::{BareVm, range};
use crate::{Mode, Work};

/// As much as one KVM_SET_MEMORY_ATTRIBUTES gets, so that no other vCPU waits long for it.
const CHUNK: u64 = 2 << 20;

impl BareVm {
    pub(crate) fn convert(&self, pages: Range, to: State) -> io::Result<()> {
        if self.plan.work == Work::Nothing {
            return Ok(());
        }
        if self.plan.work == Work::All && self.plan.mode == Mode::Attributes && to == State::Shared {
            self.clean(pages)?;
        }
        match (self.plan.mode, self.plan.shared_bit) {
            (Mode::Attributes, None) => self.attribute(pages, to)?,
            (Mode::Attributes, Some(_)) => {
                self.attribute(self.views.view(pages, State::Shared), to)?;
                self.private_slot(pages, to)?;
            }
            (Mode::Memslots, _) => self.swap(pages, to)?,
        }
        match self.plan.work {
            Work::Discard | Work::All => self.discard(pages, to.other()),
            Work::Nothing | Work::Enforce => Ok(()),
        }
    }

    fn attribute(&self, pages: Range, to: State) -> io::Result<()> {
        let mut start = pages.gpa();
        while start < pages.end() {
            let end = (start - start % CHUNK + CHUNK).min(pages.end());
            self.set_attributes(range(start, end - start)?, to)?;
            start = end;
        }
        Ok(())
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The private view of a page in state private has a slot, and no other.
    fn private_slot(&self, pages: Range, to: State) -> io::Result<()> {
        let mut slots = self.slots();
        match (to, slots.around(pages.gpa())) {
            (State::Private, None) => {
                let id = slots.take().ok_or(io::ErrorKind::StorageFull)?;
                self.create_slot(id, pages, State::Private)?;
                let (end, state) = (pages.end(), State::Private);
                slots.at.insert(pages.gpa(), Slot { end, id, state });
                Ok(())
            }
            (State::Shared, Some((start, slot))) if (start, slot.end) == (pages.gpa(), pages.end()) => {
                self.delete_slot(slot.id)?;
                slots.remove(start);
                Ok(())
            }
            _ => Err(unexpected("conversions that overlap")),
        }
    }

    /// Takes the pages out of the slot they are in, and joins them to their neighbours in the other state.
    fn swap(&self, pages: Range, to: State) -> io::Result<()> {
        let mut slots = self.slots();
        let (outer_start, outer) = match slots.around(pages.gpa()) {
            Some((_, slot)) if slot.state == to => return Ok(()),
            Some((start, slot)) if pages.end() <= slot.end => (start, slot),
            _ => return Err(unexpected("a conversion across memslots")),
        };
        let joins = |slot: &(u64, Slot)| slot.1.state == to;
        let part = slots.part;
        let below = (pages.gpa() == outer_start && !pages.gpa().is_multiple_of(part))
            .then(|| slots.around(pages.gpa() - 1))
            .flatten()
            .filter(joins);
        let above = (pages.end() == outer.end && !pages.end().is_multiple_of(part))
            .then(|| slots.around(pages.end()))
            .flatten()
            .filter(joins);
        let start = below.map_or(pages.gpa(), |(start, _)| start);
        let end = above.map_or(pages.end(), |(_, slot)| slot.end);
        for (start, slot) in [Some((outer_start, outer)), below, above].into_iter().flatten() {
            self.delete_slot(slot.id)?;
            slots.remove(start);
        }
        let left = [(outer_start, pages.gpa()), (pages.end(), outer.end)].map(|(start, end)| (start, end, outer.state));
        for (start, end, state) in left.into_iter().chain([(start, end, to)]) {
            let Some(piece) = Range::new(start, end - start) else {
                continue;
            };
            let id = slots.take().ok_or(io::ErrorKind::StorageFull)?;
            self.create_slot(id, piece, state)?;
            slots.at.insert(start, Slot { end, id, state });
        }
        Ok(())
    }
}

pub(crate) fn unexpected(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the bare loop does not know {what}"),
    )
}
