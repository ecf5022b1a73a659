//! Memslots: as few as the private and shared runs allow.
//!
//! A [`Layer`] is one side of memory at one place in the guest's physical address space. Which of a layer's pages
//! have a slot is changed by planning first: a plan that needs too many slots is refused before KVM sees any of it.

use std::collections::BTreeMap;

use crate::memory::address::{Range, State};

/// A slot that exists or is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub id: u32,
    /// Index of its layer.
    pub layer: usize,
    /// The pages behind it, without the shared bit.
    pub range: Range,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Which side's memory is behind these slots, and which view they appear at.
    pub side: State,
    /// Whether a guest_memfd is bound to the slots besides the host memory.
    pub both_sides: bool,
}

/// What is to be done, deletions first.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub delete: Vec<Slot>,
    pub create: Vec<Slot>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfSlots {
    pub needed: usize,
    pub available: usize,
}

pub(crate) struct SlotTable {
    layers: Vec<(Layer, BTreeMap<u64, Slot>)>,
    /// Slots never cross these addresses, which ascend.
    borders: Vec<u64>,
    numbers: Numbers,
    /// What the last plan took of memory, for the next one.
    spare: Plan,
}

/// The numbers of slots.
struct Numbers {
    /// Below `fresh`, those that are not in use.
    free: Vec<u32>,
    /// This and the higher ones never were in use.
    fresh: u32,
    max: u32,
}

/// A change of one layer: these pages get slots, or lose them.
pub(crate) type LayerChange = (usize, bool);

impl SlotTable {
    pub(crate) fn new(layers: &[Layer], borders: Vec<u64>, max: u32) -> Self {
        Self {
            layers: layers.iter().map(|layer| (*layer, BTreeMap::new())).collect(),
            borders,
            numbers: Numbers {
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

    /// The slots that overlap `range`, of all layers.
    pub(crate) fn find(&self, range: Range) -> Vec<Slot> {
        (0..self.layers.len())
            .flat_map(|layer| self.overlapping(layer, range.gpa(), range.end()).collect::<Vec<_>>())
            .collect()
    }

    /// How far from the start of `range` at most `max` slots of each layer go; at least one page.
    pub(crate) fn reach(&self, range: Range, max: usize) -> u64 {
        let next = |layer| self.overlapping(layer, range.gpa(), range.end()).nth(max);
        let ends = (0..self.layers.len()).filter_map(|layer| next(layer).map(|slot| slot.range.gpa()));
        ends.min().unwrap_or(range.end())
    }

    fn overlapping(&self, layer: usize, start: u64, end: u64) -> impl Iterator<Item = Slot> + '_ {
        let slots = &self.layers[layer].1;
        let first = slots.range(..=start).next_back().map_or(start, |(gpa, _)| *gpa);
        slots
            .range(first..end)
            .map(|(_, slot)| *slot)
            .filter(move |slot| slot.range.end() > start)
    }

    /// As [`overlapping`](Self::overlapping), from the last one down.
    fn overlapping_down(&self, layer: usize, start: u64, end: u64) -> impl Iterator<Item = Slot> + '_ {
        let below = self.layers[layer].1.range(..end).rev();
        below
            .map(|(_, slot)| *slot)
            .take_while(move |slot| slot.range.end() > start)
    }

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
            let number = reused.or_else(|| self.numbers.nth(index - plan.delete.len()));
            let Some(id) = number else {
                return Err(OutOfSlots {
                    needed: plan.create.len(),
                    available: index,
                });
            };
            slot.id = id;
        }
        Ok(plan)
    }

    /// Takes the plan over, after KVM has.
    pub(crate) fn commit(&mut self, plan: Plan) {
        for slot in &plan.delete {
            self.layers[slot.layer].1.remove(&slot.range.gpa());
        }
        for slot in &plan.create {
            self.layers[slot.layer].1.insert(slot.range.gpa(), *slot);
        }
        let (deleted, created) = (plan.delete.len(), plan.create.len());
        self.numbers.take(created.saturating_sub(deleted));
        let given_back = plan.delete.iter().skip(created).map(|slot| slot.id);
        self.numbers.free.extend(given_back);
        self.spare = plan;
    }

    fn is_border(&self, gpa: u64) -> bool {
        self.borders.binary_search(&gpa).is_ok()
    }

    /// Those inside of `range`.
    fn borders_in(&self, range: Range) -> &[u64] {
        let first = self.borders.partition_point(|border| *border <= range.gpa());
        let inside = self.borders[first..].partition_point(|border| *border < range.end());
        &self.borders[first..first + inside]
    }

    fn plan_insert(&self, layer: usize, piece: Range, plan: &mut Plan) {
        let (mut start, mut end) = (piece.gpa(), piece.end());
        let reach_down = u64::from(start > 0 && !self.is_border(start));
        let reach_up = u64::from(!self.is_border(end));
        let touched = || self.overlapping_down(layer, piece.gpa() - reach_down, piece.end() + reach_up);
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

    fn plan_remove(&self, layer: usize, piece: Range, plan: &mut Plan) {
        for slot in self.overlapping_down(layer, piece.gpa(), piece.end()) {
            plan.create.extend(unnumbered(layer, slot.range.gpa(), piece.gpa()));
            plan.create.extend(unnumbered(layer, piece.end(), slot.range.end()));
            plan.delete.push(slot);
        }
    }
}

/// A slot that gets its number later, if there are such pages.
fn unnumbered(layer: usize, start: u64, end: u64) -> Option<Slot> {
    let range = Range::new(start, end.checked_sub(start)?)?;
    Some(Slot { id: 0, layer, range })
}

impl Numbers {
    /// The next one but so many.
    fn nth(&self, index: usize) -> Option<u32> {
        match self.free.len().checked_sub(index + 1) {
            Some(at) => Some(self.free[at]),
            None => u32::try_from(index - self.free.len())
                .ok()
                .and_then(|index| self.fresh.checked_add(index))
                .filter(|number| *number < self.max),
        }
    }

    /// So many are in use now.
    fn take(&mut self, count: usize) {
        let reused = count.min(self.free.len());
        self.free.truncate(self.free.len() - reused);
        self.fresh += (count - reused) as u32;
    }
}

#[cfg(test)]
mod tests;
