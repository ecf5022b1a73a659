//! Memslots: as few as the private and shared runs allow.
//!
//! A [`Layer`] is one side of memory at one place in the guest's physical address space. Which of a layer's pages
//! have a slot is changed by planning first: a plan that needs too many slots is refused before KVM sees any of it.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use crate::attributes::{Range, State};

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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub delete: Few<Slot>,
    pub create: Few<Slot>,
}

/// As many as a page in the midst of others takes; more are rare.
type Few<T> = SmallVec<[T; 4]>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfSlots {
    pub needed: usize,
    pub available: usize,
}

pub(crate) struct SlotTable {
    layers: Vec<(Layer, BTreeMap<u64, Slot>)>,
    /// Slots never cross these addresses.
    borders: Vec<u64>,
    used: Vec<bool>,
}

/// A change of one layer: these pages get slots, or lose them.
pub(crate) type LayerChange = (usize, bool);

impl SlotTable {
    pub(crate) fn new(layers: &[Layer], borders: Vec<u64>, max: u32) -> Self {
        Self {
            layers: layers.iter().map(|layer| (*layer, BTreeMap::new())).collect(),
            borders,
            used: vec![false; max as usize],
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

    pub(crate) fn plan(&self, range: Range, changes: &[LayerChange]) -> Result<Plan, OutOfSlots> {
        let mut delete = Few::new();
        let mut create = Few::new();
        for (layer, present) in changes {
            for piece in self.cut(range) {
                match present {
                    true => self.plan_insert(*layer, piece, &mut delete, &mut create),
                    false => self.plan_remove(*layer, piece, &mut delete, &mut create),
                }
            }
        }
        let reused: Few<u32> = delete.iter().map(|slot: &Slot| slot.id).collect();
        let free = self.used.iter().enumerate().filter(|(_, used)| !**used);
        let mut ids = reused.into_iter().chain(free.map(|(id, _)| id as u32));
        let needed = create.len();
        let create: Few<Slot> = create
            .into_iter()
            .map_while(|(layer, range)| ids.next().map(|id| Slot { id, layer, range }))
            .collect();
        if create.len() < needed {
            return Err(OutOfSlots {
                needed,
                available: create.len(),
            });
        }
        Ok(Plan { delete, create })
    }

    /// Takes the plan over, after KVM has.
    pub(crate) fn commit(&mut self, plan: &Plan) {
        for slot in &plan.delete {
            self.layers[slot.layer].1.remove(&slot.range.gpa());
            self.used[slot.id as usize] = false;
        }
        for slot in &plan.create {
            self.layers[slot.layer].1.insert(slot.range.gpa(), *slot);
            self.used[slot.id as usize] = true;
        }
    }

    fn cut(&self, range: Range) -> impl Iterator<Item = Range> + '_ {
        let starts = std::iter::once(range.gpa()).chain(self.borders_in(range));
        let ends = self.borders_in(range).chain(std::iter::once(range.end()));
        starts
            .zip(ends)
            .filter_map(|(start, end)| Range::new(start, end - start))
    }

    fn borders_in(&self, range: Range) -> impl Iterator<Item = u64> + '_ {
        let inside = move |border: &&u64| range.gpa() < **border && **border < range.end();
        self.borders.iter().filter(inside).copied()
    }

    fn plan_insert(&self, layer: usize, piece: Range, delete: &mut Few<Slot>, create: &mut Few<(usize, Range)>) {
        let (mut start, mut end) = (piece.gpa(), piece.end());
        let reach_down = u64::from(start > 0 && !self.borders.contains(&start));
        let reach_up = u64::from(!self.borders.contains(&end));
        let touched: Few<Slot> = self.overlapping(layer, start - reach_down, end + reach_up).collect();
        if let [only] = touched[..]
            && only.range.gpa() <= start
            && end <= only.range.end()
        {
            return;
        }
        for slot in touched {
            start = start.min(slot.range.gpa());
            end = end.max(slot.range.end());
            delete.push(slot);
        }
        create.extend(Range::new(start, end - start).map(|range| (layer, range)));
    }

    fn plan_remove(&self, layer: usize, piece: Range, delete: &mut Few<Slot>, create: &mut Few<(usize, Range)>) {
        for slot in self.overlapping(layer, piece.gpa(), piece.end()) {
            let before = Range::new(slot.range.gpa(), piece.gpa().saturating_sub(slot.range.gpa()));
            let after = Range::new(piece.end(), slot.range.end().saturating_sub(piece.end()));
            create.extend(before.into_iter().chain(after).map(|range| (layer, range)));
            delete.push(slot);
        }
    }
}

#[cfg(test)]
mod tests;
