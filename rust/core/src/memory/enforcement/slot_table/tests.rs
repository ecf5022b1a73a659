//! The table against a model: a flag for each page of each layer.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::collections::BTreeSet;

use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use super::*;
use crate::memory::address::PAGE_SIZE;

const PAGES: u64 = 40;
const LAYERS: usize = 2;

/// Which pages have a slot, in each layer.
#[derive(Clone)]
struct Model {
    present: [[bool; PAGES as usize]; LAYERS],
    borders: Vec<u64>,
}

fn pages(first: u64, count: u64) -> Range {
    Range::new(first * PAGE_SIZE, count * PAGE_SIZE).unwrap()
}

impl Model {
    fn change(&mut self, range: Range, changes: &[LayerChange]) {
        for (layer, present) in changes {
            for page in range.gpa() / PAGE_SIZE..range.end() / PAGE_SIZE {
                self.present[*layer][page as usize] = *present;
            }
        }
    }

    /// The memslots that there should be: layer, start and end of each longest possible run of pages.
    fn slots(&self) -> BTreeSet<(usize, u64, u64)> {
        let mut slots = BTreeSet::new();
        for (layer, present) in self.present.iter().enumerate() {
            let mut start = None;
            for page in 0..=PAGES {
                let here = present.get(page as usize).copied().unwrap_or(false);
                let cut = self.borders.contains(&(page * PAGE_SIZE));
                if let Some(first) = start.filter(|_| !here || cut) {
                    slots.insert((layer, first * PAGE_SIZE, page * PAGE_SIZE));
                    start = None;
                }
                if here {
                    start.get_or_insert(page);
                }
            }
        }
        slots
    }
}

fn plain(slot: &Slot) -> (usize, u64, u64) {
    (slot.layer, slot.range.gpa(), slot.range.end())
}

fn all(table: &SlotTable) -> Vec<Slot> {
    table.find(pages(0, PAGES))
}

fn new_table(borders: &[u64], max: u32) -> SlotTable {
    let layer = |side| Layer {
        view: side,
        side,
        both_sides: false,
    };
    let layers = [layer(State::Shared), layer(State::Private)];
    SlotTable::new(&layers, borders.to_vec(), max)
}

#[derive(Clone, Debug)]
struct Op {
    range: Range,
    changes: Vec<LayerChange>,
    /// Whether KVM carries out the plan.
    commit: bool,
}

fn ops() -> impl Strategy<Value = Op> {
    let changes = prop_oneof![
        (0..LAYERS, any::<bool>()).prop_map(|change| vec![change]),
        any::<bool>().prop_map(|private| vec![(0, !private), (1, private)]),
    ];
    let range = (0..PAGES).prop_flat_map(|first| {
        let longest = PAGES - first;
        let count = prop_oneof![3 => 1..=longest.min(4), 1 => 1..=longest];
        count.prop_map(move |count| pages(first, count))
    });
    (range, changes, prop::bool::weighted(0.9)).prop_map(|(range, changes, commit)| Op { range, changes, commit })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn like_a_flag_for_each_page(
        borders in btree_set(1..PAGES, 0..4),
        max in prop_oneof![1..=12_u32, Just(2 * PAGES as u32)],
        ops in vec(ops(), 1..40),
    ) {
        let borders: Vec<u64> = borders.iter().map(|page| page * PAGE_SIZE).collect();
        let mut table = new_table(&borders, max);
        let mut model = Model { present: [[false; PAGES as usize]; LAYERS], borders };
        for op in ops {
            let before = all(&table);
            let mut after = model.clone();
            after.change(op.range, &op.changes);
            let (old, new) = (model.slots(), after.slots());
            let room = max as usize - old.difference(&new).fold(old.len(), |used, _| used - 1);
            let needed = new.difference(&old).count();
            match table.plan(op.range, &op.changes) {
                Err(out) => {
                    prop_assert!(new.len() > max as usize);
                    prop_assert_eq!(out, OutOfSlots { needed, available: room });
                    prop_assert_eq!(&all(&table), &before);
                }
                Ok(plan) => {
                    prop_assert!(new.len() <= max as usize);
                    // No more is deleted or created than has to be.
                    let deleted: BTreeSet<_> = plan.delete.iter().map(plain).collect();
                    let created: BTreeSet<_> = plan.create.iter().map(plain).collect();
                    prop_assert_eq!(&deleted, &old.difference(&new).copied().collect());
                    prop_assert_eq!(&created, &new.difference(&old).copied().collect());
                    prop_assert_eq!((deleted.len(), created.len()), (plan.delete.len(), plan.create.len()));
                    // The deleted memslots exist under these numbers, and the new numbers are not in use.
                    prop_assert!(plan.delete.iter().all(|slot| before.contains(slot)));
                    let remain: Vec<&Slot> = before.iter().filter(|slot| !plan.delete.contains(slot)).collect();
                    for slot in &plan.create {
                        prop_assert!(slot.id < max);
                        prop_assert!(remain.iter().all(|other| other.id != slot.id));
                        let same_layer = remain.iter().filter(|other| other.layer == slot.layer);
                        prop_assert!(same_layer.into_iter().all(|other| !other.range.overlaps(&slot.range)));
                    }
                    let ids: BTreeSet<u32> = plan.create.iter().map(|slot| slot.id).collect();
                    prop_assert_eq!(ids.len(), plan.create.len());
                    // Planning changes nothing.
                    prop_assert_eq!(&all(&table), &before);
                    if op.commit {
                        table.commit(plan);
                        model = after;
                    }
                }
            }
            let slots = all(&table);
            prop_assert_eq!(slots.iter().map(plain).collect::<BTreeSet<_>>(), model.slots());
            let used = table.ids.fresh as usize - table.ids.free.len();
            prop_assert_eq!(used, slots.len());
            let mut found = table.find(op.range);
            found.sort_by_key(plain);
            let mut overlapping: Vec<Slot> = slots.into_iter().filter(|slot| slot.range.overlaps(&op.range)).collect();
            overlapping.sort_by_key(plain);
            prop_assert_eq!(found, overlapping);
        }
    }
}

#[test]
fn neighbours_grow_together_but_not_across_a_border() {
    let mut table = new_table(&[8 * PAGE_SIZE], 8);
    for first in [2, 6, 4, 8] {
        let plan = table.plan(pages(first, 2), &[(0, true)]).unwrap();
        table.commit(plan);
    }
    let slots: Vec<_> = all(&table).iter().map(plain).collect();
    let bytes = |first: u64, end: u64| (0, first * PAGE_SIZE, end * PAGE_SIZE);
    assert_eq!(slots, [bytes(2, 8), bytes(8, 10)]);
}

#[test]
fn what_is_as_wanted_needs_no_plan() {
    let mut table = new_table(&[8 * PAGE_SIZE], 2);
    let plan = table.plan(pages(0, 16), &[(0, true)]).unwrap();
    assert_eq!((plan.delete.len(), plan.create.len()), (0, 2));
    table.commit(plan);
    let again = table.plan(pages(3, 10), &[(0, true), (1, false)]).unwrap();
    assert_eq!(again, Plan::default());
    let refused = table.plan(pages(3, 1), &[(0, false)]).unwrap_err();
    let out = OutOfSlots {
        needed: 2,
        available: 1,
    };
    assert_eq!(refused, out);
}

#[test]
fn the_slots_of_a_plan_that_swaps_layers_take_over_its_numbers() {
    let mut table = new_table(&[], 1);
    let first = table.plan(pages(0, 4), &[(0, true)]).unwrap();
    table.commit(first);
    let swap = table.plan(pages(0, 4), &[(0, false), (1, true)]).unwrap();
    assert_eq!((swap.delete[0].id, swap.create[0].id), (0, 0));
    table.commit(swap);
    assert_eq!(all(&table).len(), 1);
    assert_eq!(table.layer(all(&table)[0].layer).side, State::Private);
}
