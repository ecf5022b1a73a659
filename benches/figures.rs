//! What `benches/anywhere.py` measures of the core's bookkeeping, as one JSON object of plain figures: bytes, and
//! nanoseconds a page, each the best of several rounds in which all take turns.
//!
//!     figures [--short]
//!
//! `--short` does with a tenth of the work where a clock counts instructions and nothing has to be repeated.
#![allow(clippy::unwrap_used, missing_docs)]

mod baselines;

use std::cell::RefCell;
use std::fmt::Write;
use std::hint::black_box;
use std::time::Instant;

use baselines::{BLOCK, States, scattered};
use pagegate_core::attributes::{AttributeMap, State};
use rangemap::RangeMap;
use roaring::RoaringBitmap;

const GIB: u64 = (1 << 30) / 4096;
const TIB: u64 = 1024 * GIB;
/// Blocks of 2 MiB in 128 MiB, for which an attribute map keeps one piece of bits.
const LEAF_BLOCKS: u64 = 64;

struct Plan {
    rounds: u32,
    /// Changes or queries a round.
    batch: u64,
    /// Which 2 MiB blocks of the worst case have every other page private.
    which: fn(u64) -> bool,
    /// Pages of the guest for which a range map is made: a TiB of them takes it gigabytes.
    range_map: u64,
}

const WHOLE: Plan = Plan {
    rounds: 15,
    batch: 1 << 15,
    which: |_| true,
    range_map: 16 * GIB,
};

/// One block of each 128 MiB: to an attribute map as bad as all of them.
const SHORT: Plan = Plan {
    rounds: 2,
    batch: 1 << 12,
    which: |block| block.is_multiple_of(LEAF_BLOCKS),
    range_map: 64 * GIB,
};

fn main() {
    let plan = match std::env::args().any(|arg| arg == "--short") {
        true => SHORT,
        false => WHOLE,
    };
    let mut figures = Figures::default();
    let map = worst_case(&plan, &mut figures);
    against_baselines(&plan, map, &mut figures);
    by_size(&plan, &mut figures);
    println!("{{{}}}", figures.0);
}

#[derive(Default)]
struct Figures(String);

impl Figures {
    fn add(&mut self, name: &str, value: f64) {
        let comma = if self.0.is_empty() { "" } else { ", " };
        write!(self.0, "{comma}\"{name}\": {value:.3}").unwrap();
    }
}

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn worst_case(plan: &Plan, figures: &mut Figures) -> AttributeMap {
    let before = resident();
    let mut map = <AttributeMap as States>::new(TIB);
    map.fill(TIB, plan.which);
    figures.add("worst_case_resident", (resident() - before) as f64);
    figures.add("worst_case_counted", map.memory() as f64);
    map
}

struct Task<'a> {
    name: String,
    /// What a round's nanoseconds are divided by.
    work: f64,
    run: Box<dyn FnMut() + 'a>,
}

impl<'a> Task<'a> {
    fn new(name: String, work: u64, run: impl FnMut() + 'a) -> Self {
        let (work, run) = (work as f64, Box::new(run));
        Self { name, work, run }
    }
}

fn take_turns(rounds: u32, mut tasks: Vec<Task<'_>>, figures: &mut Figures) {
    let mut best = vec![f64::MAX; tasks.len()];
    for _ in 0..rounds {
        for (best, task) in best.iter_mut().zip(&mut tasks) {
            let start = Instant::now();
            (task.run)();
            *best = best.min(start.elapsed().as_nanos() as f64);
        }
    }
    for (best, task) in best.iter().zip(&tasks) {
        figures.add(&task.name, best / task.work);
    }
}

/// To and fro: pages and whether they are private.
fn change<T: States>(states: &mut T, pages: &[(u64, bool)], batch: u64) {
    for (page, private) in pages.iter().cycle().take(batch as usize / 2) {
        states.set(*page, !private);
        states.set(*page, *private);
    }
}

fn query<T: States>(states: &T, pages: &[(u64, bool)], batch: u64) {
    for (page, _) in pages.iter().cycle().take(batch as usize) {
        black_box(states.is_private(*page));
    }
}

fn query_blocks<T: States>(states: &T, pages: &[(u64, bool)], batch: u64) {
    for (page, _) in pages.iter().cycle().take(batch as usize) {
        black_box(states.is_mixed(*page / BLOCK));
    }
}

/// The four things that are done with it, in the pattern of the worst case.
fn measure<T: States>(plan: &Plan, states: T, pages: u64, figures: &mut Figures) {
    let wanted: Vec<(u64, bool)> = scattered(plan.batch / 2, pages)
        .into_iter()
        // Into the blocks that are mixed.
        .map(|page| {
            let block = page / BLOCK;
            let block = (0..=block).rev().find(|block| (plan.which)(*block)).unwrap_or(0);
            block * BLOCK + page % BLOCK
        })
        .map(|page| (page, states.is_private(page)))
        .collect();
    let states = RefCell::new(states);
    let (runs, batch) = (states.borrow().runs(), plan.batch);
    let name = |what: &str| format!("{what}_{}", T::NAME);
    let tasks = vec![
        Task::new(name("change"), batch, || {
            change(&mut *states.borrow_mut(), &wanted, batch)
        }),
        Task::new(name("query"), batch, || query(&*states.borrow(), &wanted, batch)),
        Task::new(name("query_block"), batch, || {
            query_blocks(&*states.borrow(), &wanted, batch)
        }),
    ];
    take_turns(plan.rounds, tasks, figures);
    let enumerate = || assert!(states.borrow().runs() == runs);
    take_turns(
        plan.rounds.min(3),
        vec![Task::new(name("run"), runs, enumerate)],
        figures,
    );
}

fn against_baselines(plan: &Plan, map: AttributeMap, figures: &mut Figures) {
    measure(plan, map, TIB, figures);
    let mut roaring = <RoaringBitmap as States>::new(TIB);
    roaring.fill(TIB, plan.which);
    measure(plan, roaring, TIB, figures);
    let mut ranges = <RangeMap<u64, State> as States>::new(plan.range_map);
    ranges.fill(plan.range_map, plan.which);
    measure(plan, ranges, plan.range_map, figures);
}

/// The same number of pages in a guest of a GiB and in one of a TiB.
fn by_size(plan: &Plan, figures: &mut Figures) {
    for count in [16, 64, 256, 1024, 16384] {
        let sizes = [("1g", GIB), ("1t", TIB)].map(|(name, pages)| {
            let wanted = scattered(count, pages);
            let mut map = <AttributeMap as States>::new(pages);
            // From the start on each of them is in a block that is mixed, as where pages change there are more.
            for page in &wanted {
                States::set(&mut map, page ^ 1, true);
            }
            let wanted: Vec<(u64, bool)> = wanted.into_iter().map(|page| (page, map.is_private(page))).collect();
            (name, wanted, RefCell::new(map))
        });
        let batch = plan.batch;
        let mut tasks = Vec::new();
        for (size, wanted, map) in &sizes {
            let name = |what: &str| format!("{what}_{size}_{count}");
            tasks.push(Task::new(name("change"), batch, || {
                change(&mut *map.borrow_mut(), wanted, batch)
            }));
            tasks.push(Task::new(name("query"), batch, || query(&*map.borrow(), wanted, batch)));
            tasks.push(Task::new(name("query_block"), batch, || {
                query_blocks(&*map.borrow(), wanted, batch)
            }));
        }
        take_turns(plan.rounds, tasks, figures);
    }
}
