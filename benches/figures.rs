//! One run of what `benches/anywhere.py` measures of the page states' bookkeeping, as a JSON object: bytes, and nanoseconds
//! a page, each the best of several rounds in which all take turns.
//!
//!     figures [--short]
//!
//! `--short` does a tenth of the work: for an emulated CPU.
#![allow(clippy::unwrap_used, missing_docs)]

mod pages;

use std::cell::RefCell;
use std::fmt::Write;
use std::hint::black_box;
use std::time::Instant;

use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::memory::page_map::AttributeMap;
use pages::{BLOCK, scattered};

const GIB: u64 = (1 << 30) / PAGE_SIZE;
const TIB: u64 = 1024 * GIB;
/// Blocks of 2 MiB in 128 MiB, whose bits the attribute map keeps in one allocation.
const LEAF_BLOCKS: u64 = 64;

struct Plan {
    rounds: u32,
    /// Changes or queries a round.
    batch: u64,
    /// Which 2 MiB blocks of the worst case have every other page private.
    which: fn(u64) -> bool,
}

const WHOLE: Plan = Plan {
    rounds: 15,
    batch: 1 << 15,
    which: |_| true,
};

/// One block of each 128 MiB takes an attribute map as much memory as all of them.
const SHORT: Plan = Plan {
    rounds: 2,
    batch: 1 << 12,
    which: |block| block.is_multiple_of(LEAF_BLOCKS),
};

fn main() {
    let plan = match std::env::args().any(|arg| arg == "--short") {
        true => SHORT,
        false => WHOLE,
    };
    let mut figures = Figures::default();
    worst_case(&plan, &mut figures);
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

fn range(first: u64, pages: u64) -> Range {
    Range::new(first * PAGE_SIZE, pages * PAGE_SIZE).unwrap()
}

fn set(map: &mut AttributeMap, page: u64, private: bool) {
    let to = if private { State::Private } else { State::Shared };
    map.set(range(page, 1), to);
}

fn is_private(map: &AttributeMap, page: u64) -> bool {
    map.state(page * PAGE_SIZE) == State::Private
}

/// Every other page of 1 TiB, or of those of its blocks that the plan picks.
fn worst_case(plan: &Plan, figures: &mut Figures) {
    let before = resident();
    let mut map = AttributeMap::new(TIB * PAGE_SIZE, State::Shared);
    for block in (0..TIB / BLOCK).filter(|block| (plan.which)(*block)) {
        for page in (block * BLOCK..(block + 1) * BLOCK).step_by(2) {
            set(&mut map, page, true);
        }
    }
    figures.add("worst_case_resident", (resident() - before) as f64);
    figures.add("worst_case_counted", map.memory() as f64);
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

/// Changes pages and changes them back. `pages`: each with whether it is private.
fn change(map: &mut AttributeMap, pages: &[(u64, bool)], batch: u64) {
    for (page, private) in pages.iter().cycle().take(batch as usize / 2) {
        set(map, *page, !private);
        set(map, *page, *private);
    }
}

fn query(map: &AttributeMap, pages: &[(u64, bool)], batch: u64) {
    for (page, _) in pages.iter().cycle().take(batch as usize) {
        black_box(is_private(map, *page));
    }
}

fn query_blocks(map: &AttributeMap, pages: &[(u64, bool)], batch: u64) {
    for (page, _) in pages.iter().cycle().take(batch as usize) {
        black_box(map.uniform(range(*page / BLOCK * BLOCK, BLOCK)));
    }
}

/// The same number of pages in a guest of a GiB and in one of a TiB.
fn by_size(plan: &Plan, figures: &mut Figures) {
    for count in [16, 64, 256, 1024, 16384] {
        let sizes = [("1g", GIB), ("1t", TIB)].map(|(name, pages)| {
            let wanted = scattered(count, pages);
            let mut map = AttributeMap::new(pages * PAGE_SIZE, State::Shared);
            // Each of them is in a mixed block from the start, as a page that changes mostly is.
            for page in &wanted {
                set(&mut map, page ^ 1, true);
            }
            let wanted: Vec<(u64, bool)> = wanted.into_iter().map(|page| (page, is_private(&map, page))).collect();
            (name, wanted, RefCell::new(map))
        });
        let batch = plan.batch;
        let mut tasks = Vec::new();
        for (size, wanted, map) in &sizes {
            let name = |what: &str| format!("{what}_{size}_{count}");
            tasks.push(Task::new(name("change"), batch, || {
                change(&mut map.borrow_mut(), wanted, batch)
            }));
            tasks.push(Task::new(name("query"), batch, || query(&map.borrow(), wanted, batch)));
            tasks.push(Task::new(name("query_block"), batch, || {
                query_blocks(&map.borrow(), wanted, batch)
            }));
        }
        take_turns(plan.rounds, tasks, figures);
    }
}
