//! The memslots that conversions create and delete.

use std::collections::BTreeMap;

use crate::plan::{Mode, Plan};

/// A memslot: its end, its number, and whether it refers to the private side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub end: u64,
    pub id: u32,
    pub private: bool,
}

/// The memslots by their first gpa, without the shared bit. With attributes only those at private views, and there are
/// none at first; with traps none.
#[derive(Debug)]
pub(crate) struct Slots {
    pub at: BTreeMap<u64, Slot>,
    /// Bytes of each part of memory that no memslot crosses.
    pub part: u64,
    /// Numbers that are not in use.
    free: Vec<u32>,
}

/// The most memslots: more than any workload here uses.
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
        let replaced = plan.mode == Mode::Memslots;
        Self {
            at: (0..used).filter(|_| replaced).map(first).collect(),
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

    /// The memslot that contains `gpa`, and its first gpa.
    pub(crate) fn around(&self, gpa: u64) -> Option<(u64, Slot)> {
        let (start, slot) = self.at.range(..=gpa).next_back()?;
        (gpa < slot.end).then_some((*start, *slot))
    }
}
