//! Which memslots there are, where conversions change them.

use std::collections::BTreeMap;

use pagegate_core::attributes::State;

use crate::Plan;

/// A slot: how far it goes, its number, and which side's memory it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub end: u64,
    pub id: u32,
    pub state: State,
}

/// Slots by where they begin, without the shared bit. With attributes these are the private views' alone, which none
/// has at first.
#[derive(Debug)]
pub(crate) struct Slots {
    pub at: BTreeMap<u64, Slot>,
    pub part: u64,
    free: Vec<u32>,
}

/// More than any guest needs here.
const MOST: u32 = 4096;

impl Slots {
    pub(crate) fn new(plan: &Plan) -> Self {
        let part = plan.memory / plan.memslots;
        let used = plan.memslots as u32;
        let first = |index: u32| {
            let start = u64::from(index) * part;
            let (end, state) = (start + part, State::Shared);
            (start, Slot { end, id: index, state })
        };
        let swapped = plan.mode == crate::Mode::Memslots;
        Self {
            at: (0..used).filter(|_| swapped).map(first).collect(),
            part,
            free: (used..MOST.max(used)).rev().collect(),
        }
    }

    /// A number for a new slot.
    pub(crate) fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Forgets a slot that was deleted.
    pub(crate) fn remove(&mut self, start: u64) {
        if let Some(slot) = self.at.remove(&start) {
            self.free.push(slot.id);
        }
    }

    /// The slot that holds `gpa`.
    pub(crate) fn around(&self, gpa: u64) -> Option<(u64, Slot)> {
        let (start, slot) = self.at.range(..=gpa).next_back()?;
        (gpa < slot.end).then_some((*start, *slot))
    }
}
