//! The attribute map beside what else could keep the state of each page.
#![allow(missing_docs)]

mod baselines;
mod pages;

use std::hint::black_box;

use baselines::States;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::memory::page_map::AttributeMap;
use pages::{BLOCK, scattered};
use rangemap::RangeMap;
use roaring::RoaringBitmap;

const GIB: u64 = (1 << 30) / PAGE_SIZE;

/// In a guest of so many pages of which every other is private, and pages at random.
fn everything<T: States>(criterion: &mut Criterion, size: &str, pages: u64, count: u64) {
    let mut states = T::new(pages);
    states.fill(pages, |_| true);
    let wanted = scattered(count, pages);
    let mut group = criterion.benchmark_group(size);
    let mut next = wanted.iter().copied().cycle();
    let mut page = move || next.next().unwrap_or_default();
    group.bench_function(format!("change and change back/{}", T::NAME), |bencher| {
        bencher.iter(|| {
            let page = page();
            states.set(page, page % 2 != 0);
            states.set(page, page % 2 == 0);
        });
    });
    group.bench_function(format!("the state of a page/{}", T::NAME), |bencher| {
        bencher.iter(|| black_box(states.is_private(page())));
    });
    group.bench_function(format!("whether 2 MiB are mixed/{}", T::NAME), |bencher| {
        bencher.iter(|| black_box(states.is_mixed(page() / BLOCK)));
    });
    group.throughput(Throughput::Elements(pages / 2)).sample_size(10);
    group.bench_function(format!("all runs/{}", T::NAME), |bencher| {
        bencher.iter(|| black_box(states.runs()));
    });
    group.finish();
}

fn small(criterion: &mut Criterion) {
    everything::<AttributeMap>(criterion, "1 GiB", GIB, 64);
    everything::<RoaringBitmap>(criterion, "1 GiB", GIB, 64);
    everything::<RangeMap<u64, State>>(criterion, "1 GiB", GIB, 64);
}

/// Without the range map, which would take gigabytes.
fn large(criterion: &mut Criterion) {
    everything::<AttributeMap>(criterion, "1 TiB", 1024 * GIB, 64);
    everything::<RoaringBitmap>(criterion, "1 TiB", 1024 * GIB, 64);
}

criterion_group!(attributes, small, large);
criterion_main!(attributes);
