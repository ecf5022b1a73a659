//! The table of memslots: as few as the runs of pages allow.
//!
//! A [`Layer`] is the memslots of one view, over one side of memory. A change of the pages that have a memslot is
//! planned first: a plan that needs more memslots than there are fails before KVM is called.

use std::collections::BTreeMap;

use crate::memory::address::{Range, State};

/// A memslot that exists or is to be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// KVM's number of it.
    pub id: u32,
    /// Index of its layer.
    pub layer: usize,
    /// Its pages, without the view bit.
    pub range: Range,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    /// The view that its memslots are at.
    pub view: State,
    /// The side whose memory they refer to.
    pub side: State,
    /// Whether its memslots have a guest_memfd, too: the private side, besides host memory.
    pub both_sides: bool,
}

/// Memslots to delete, and then memslots to create.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub delete: Vec<Slot>,
    pub create: Vec<Slot>,
}

/// The plan creates `needed` memslots, and there are numbers for `available`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfSlots {
    pub needed: usize,
    pub available: usize,
}

pub(crate) struct SlotTable {
    /// Each layer's memslots, by their first gpa.
    layers: Vec<(Layer, BTreeMap<u64, Slot>)>,
    /// Addresses that no memslot crosses, ascending.
    borders: Vec<u64>,
    ids: SlotIds,
    /// The last plan, whose allocations the next one reuses.
    spare: Plan,
}

/// Which memslot numbers are in use. KVM takes those below `max`.
struct SlotIds {
    /// Those below `fresh` that are not in use.
    free: Vec<u32>,
    /// This one and all above it have never been in use.
    fresh: u32,
    max: u32,
}

/// A layer's index, and whether pages are to have a memslot there.
pub(crate) type LayerChange = (usize, bool);

impl SlotTable {
    pub(crate) fn new(layers: &[Layer], borders: Vec<u64>, max: u32) -> Self {
        Self {
            layers: layers.iter().map(|layer| (*layer, BTreeMap::new())).collect(),
            borders,
            ids: SlotIds {
                free: Vec::new(),
                fresh: 0,
                max,
            },
            spare: Plan::default(),
        }
    }

    pub(crate) fn layer(&self, index: usize) -> Layer {
        self.layers[index].0
    }

    /// The memslots of all layers that overlap `range`.
    pub(crate) fn find(&self, range: Range) -> Vec<Slot> {
        (0..self.layers.len())
            .flat_map(|layer| self.overlapping(layer, range.gpa(), range.end()).collect::<Vec<_>>())
            .collect()
    }

    /// The end of the longest first part of `range` that overlaps at most `max` memslots of each layer.
    pub(crate) fn end_of_first(&self, max: usize, range: Range) -> u64 {
        let next = |layer| self.overlapping(layer, range.gpa(), range.end()).nth(max);
        let ends = (0..self.layers.len()).filter_map(|layer| next(layer).map(|slot| slot.range.gpa()));
        ends.min().unwrap_or(range.end())
    }

    /// The memslots of a layer that overlap `[start, end)`, ascending.
    fn overlapping(&self, layer: usize, start: u64, end: u64) -> impl Iterator<Item = Slot> + '_ {
        let slots = &self.layers[layer].1;
        let first = slots.range(..=start).next_back().map_or(start, |(gpa, _)| *gpa);
        slots
            .range(first..end)
            .map(|(_, slot)| *slot)
            .filter(move |slot| slot.range.end() > start)
    }

    /// The same, descending.
    fn overlapping_down(&self, layer: usize, start: u64, end: u64) -> impl Iterator<Item = Slot> + '_ {
        let below = self.layers[layer].1.range(..end).rev();
        below
            .map(|(_, slot)| *slot)
            .take_while(move |slot| slot.range.end() > start)
    }

    /// Plans changes of `range`: which memslots to delete, and which to create. Changes nothing in the table.
    pub(crate) fn plan(&mut self, range: Range, changes: &[LayerChange]) -> Result<Plan, OutOfSlots> {
        let mut plan = std::mem::take(&mut self.spare);
        plan.delete.clear();
        plan.create.clear();
        for (layer, present) in changes {
            let mut start = range.gpa();
            for end in self.borders_in(range).iter().chain([&range.end()]) {
                if let Some(piece) = Range::new(start, end - start) {
                    match present {
                        true => self.plan_insert(*layer, piece, &mut plan),
                        false => self.plan_remove(*layer, piece, &mut plan),
                    }
                }
                start = *end;
            }
        }
        for (index, slot) in plan.create.iter_mut().enumerate() {
            let reused = plan.delete.get(index).map(|slot| slot.id);
            let id = reused.or_else(|| self.ids.nth(index - plan.delete.len()));
            let Some(id) = id else {
                return Err(OutOfSlots {
                    needed: plan.create.len(),
                    available: index,
                });
            };
            slot.id = id;
        }
        Ok(plan)
    }

    /// Takes a plan over into the table, after KVM has carried it out.
    pub(crate) fn commit(&mut self, plan: Plan) {
        for slot in &plan.delete {
            self.layers[slot.layer].1.remove(&slot.range.gpa());
        }
        for slot in &plan.create {
            self.layers[slot.layer].1.insert(slot.range.gpa(), *slot);
        }
        let (deleted, created) = (plan.delete.len(), plan.create.len());
        self.ids.allocate(created.saturating_sub(deleted));
        let freed = plan.delete.iter().skip(created).map(|slot| slot.id);
        self.ids.free.extend(freed);
        self.spare = plan;
    }

    fn is_border(&self, gpa: u64) -> bool {
        self.borders.binary_search(&gpa).is_ok()
    }

    /// The borders inside of `range`.
    fn borders_in(&self, range: Range) -> &[u64] {
        let first = self.borders.partition_point(|border| *border <= range.gpa());
        let inside = self.borders[first..].partition_point(|border| *border < range.end());
        &self.borders[first..first + inside]
    }

    /// Plans memslots for a piece between two borders: one memslot, joined with those that overlap or touch it.
    fn plan_insert(&self, layer: usize, piece: Range, plan: &mut Plan) {
        let (mut start, mut end) = (piece.gpa(), piece.end());
        // A byte more on each side that is not a border, so that adjacent memslots are found.
        let below = u64::from(start > 0 && !self.is_border(start));
        let above = u64::from(!self.is_border(end));
        let touched = || self.overlapping_down(layer, piece.gpa() - below, piece.end() + above);
        let covers = |slot: &Slot| slot.range.gpa() <= piece.gpa() && piece.end() <= slot.range.end();
        if touched().next().is_some_and(|slot| covers(&slot)) {
            return;
        }
        for slot in touched() {
            start = start.min(slot.range.gpa());
            end = end.max(slot.range.end());
            plan.delete.push(slot);
        }
        plan.create.extend(unnumbered(layer, start, end));
    }

    /// Plans no memslot for a piece: those that overlap it are replaced by what they have on either side of it.
    fn plan_remove(&self, layer: usize, piece: Range, plan: &mut Plan) {
        for slot in self.overlapping_down(layer, piece.gpa(), piece.end()) {
            plan.create.extend(unnumbered(layer, slot.range.gpa(), piece.gpa()));
            plan.create.extend(unnumbered(layer, piece.end(), slot.range.end()));
            plan.delete.push(slot);
        }
    }
}

/// A memslot for `[start, end)` whose number is set later; `None` if there are no such pages.
fn unnumbered(layer: usize, start: u64, end: u64) -> Option<Slot> {
    let range = Range::new(start, end.checked_sub(start)?)?;
    Some(Slot { id: 0, layer, range })
}

impl SlotIds {
    /// The number of the memslot that will be the `index`th to be allocated, from 0; `None` if there are fewer numbers.
    fn nth(&self, index: usize) -> Option<u32> {
        match self.free.len().checked_sub(index + 1) {
            Some(at) => Some(self.free[at]),
            None => u32::try_from(index - self.free.len())
                .ok()
                .and_then(|index| self.fresh.checked_add(index))
                .filter(|id| *id < self.max),
        }
    }

    /// Allocates the first `count` numbers.
    fn allocate(&mut self, count: usize) {
        let reused = count.min(self.free.len());
        self.free.truncate(self.free.len() - reused);
        self.fresh += (count - reused) as u32;
    }
}

#[cfg(test)]
mod tests;
