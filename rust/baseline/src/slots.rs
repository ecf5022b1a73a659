//! Which memslots there are, where conversions change them.

use std::collections::BTreeMap;

use crate::plan::{Mode, Plan};

/// A memslot: where it ends, its number, and whether it has the private side's memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub end: u64,
    pub id: u32,
    pub private: bool,
}

/// Memslots by the gpa at which they begin, without the shared bit. With attributes only those at private views, of
/// which there are none at first.
#[derive(Debug)]
pub(crate) struct Slots {
    pub at: BTreeMap<u64, Slot>,
    pub part: u64,
    free: Vec<u32>,
}

/// More than any workload here uses.
const MOST: u32 = 4096;

impl Slots {
    pub(crate) fn new(plan: &Plan) -> Self {
        let part = plan.memory / plan.memslots;
        let used = plan.memslots as u32;
        let first = |id: u32| {
            let start = u64::from(id) * part;
            let (end, private) = (start + part, false);
            (start, Slot { end, id, private })
        };
        let swapped = plan.mode == Mode::Memslots;
        Self {
            at: (0..used).filter(|_| swapped).map(first).collect(),
            part,
            free: (used..MOST.max(used)).rev().collect(),
        }
    }

    /// A number for a new memslot.
    pub(crate) fn take(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// Forgets a memslot that was deleted.
    pub(crate) fn remove(&mut self, start: u64) {
        if let Some(slot) = self.at.remove(&start) {
            self.free.push(slot.id);
        }
    }

    /// Where the memslot that holds `gpa` begins, and the memslot.
    pub(crate) fn around(&self, gpa: u64) -> Option<(u64, Slot)> {
        let (start, slot) = self.at.range(..=gpa).next_back()?;
        (gpa < slot.end).then_some((*start, *slot))
    }
}
