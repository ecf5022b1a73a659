//! The page map against models that keep each page or each run in a plain list.

use pagegate_core::memory::{address::*, page_map::*};
use proptest::prelude::*;

const BLOCK: u64 = 512;
const LEAF: u64 = 64 * BLOCK;
const BRANCH: u64 = 64 * LEAF;
const ROOT_WORD: u64 = 64 * BRANCH;
const TIB: u64 = 1 << 40;

/// The pages `[first, end)`.
fn pages(first: u64, end: u64) -> Range {
    Range::new(first * PAGE_SIZE, (end - first) * PAGE_SIZE).expect("a valid range")
}

fn run(first: u64, end: u64, state: State) -> Run {
    Run {
        range: pages(first, end),
        state,
    }
}

/// The first page of `range` and the first one past it.
fn span(range: Range) -> (u64, u64) {
    (range.gpa() / PAGE_SIZE, range.end() / PAGE_SIZE)
}

/// The pages from `first` on, in these states, as maximal runs.
fn collect(first: u64, states: &[State]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (page, state) in (first..).zip(states) {
        match runs.last_mut() {
            Some(last) if last.state == *state => {
                *last = run(last.range.gpa() / PAGE_SIZE, page + 1, *state);
            }
            _ => runs.push(run(page, page + 1, *state)),
        }
    }
    runs
}

/// One entry a page.
#[derive(Clone)]
struct PageList {
    states: Vec<State>,
    generation: u64,
    stamps: Vec<u64>,
}

impl PageList {
    fn new(pages: u64, initial: State) -> Self {
        Self {
            states: vec![initial; pages as usize],
            generation: 0,
            stamps: vec![0; pages.div_ceil(BLOCK) as usize],
        }
    }

    fn set(&mut self, range: Range, to: State) -> u64 {
        let (first, end) = span(range);
        let mut changed = 0;
        for page in first..end {
            if self.states[page as usize] != to {
                self.states[page as usize] = to;
                self.stamps[(page / BLOCK) as usize] = self.generation + 1;
                changed += PAGE_SIZE;
            }
        }
        self.generation += u64::from(changed > 0);
        changed
    }

    fn slice(&self, range: Range) -> &[State] {
        let (first, end) = span(range);
        &self.states[first as usize..end as usize]
    }

    fn uniform(&self, range: Range) -> Option<State> {
        let slice = self.slice(range);
        slice.iter().all(|state| *state == slice[0]).then(|| slice[0])
    }

    fn runs_in(&self, range: Range) -> Vec<Run> {
        collect(span(range).0, self.slice(range))
    }

    fn all(&self) -> Range {
        pages(0, self.states.len() as u64)
    }

    fn private_bytes(&self) -> u64 {
        self.states.iter().filter(|state| **state == State::Private).count() as u64 * PAGE_SIZE
    }
}

/// One entry a run, for memories of which a page list would be too long.
#[derive(Clone)]
struct RunList(Vec<Run>);

impl RunList {
    fn push(runs: &mut Vec<Run>, range: Option<Range>, state: State) {
        let Some(range) = range else { return };
        match runs.last_mut() {
            Some(last) if last.state == state && last.range.end() == range.gpa() => {
                let size = last.range.size() + range.size();
                last.range = Range::new(last.range.gpa(), size).expect("a valid range");
            }
            _ => runs.push(Run { range, state }),
        }
    }

    fn part(range: Range, from: u64, to: u64) -> Option<Range> {
        range.intersect(&Range::new(from, to.checked_sub(from)?)?)
    }

    fn set(&mut self, range: Range, to: State) -> u64 {
        let mut runs = Vec::new();
        let mut changed = 0;
        let size = self.0.last().map_or(0, |last| last.range.end());
        for old in &self.0 {
            Self::push(&mut runs, Self::part(old.range, 0, range.gpa()), old.state);
            let inside = old.range.intersect(&range);
            if old.state != to {
                changed += inside.map_or(0, |inside| inside.size());
            }
            Self::push(&mut runs, inside, to);
            Self::push(&mut runs, Self::part(old.range, range.end(), size), old.state);
        }
        self.0 = runs;
        changed
    }

    fn runs_in(&self, range: Range) -> Vec<Run> {
        let clip = |run: &Run| {
            Some(Run {
                range: run.range.intersect(&range)?,
                ..*run
            })
        };
        self.0.iter().filter_map(clip).collect()
    }

    fn uniform(&self, range: Range) -> Option<State> {
        let runs = self.runs_in(range);
        (runs.len() == 1).then(|| runs[0].state)
    }

    fn private_bytes(&self) -> u64 {
        let private = self.0.iter().filter(|run| run.state == State::Private);
        private.map(|run| run.range.size()).sum()
    }
}

/// A place near a border of something, in units that the memory's size decides on.
#[derive(Clone, Debug)]
struct Spot {
    unit: usize,
    times: u64,
    off: i64,
}

impl Spot {
    fn page(&self, pages: u64) -> u64 {
        let unit = [1, 64, BLOCK, LEAF, BRANCH, ROOT_WORD][self.unit];
        // `pages` itself, the end of memory, is a border of every unit.
        let border = self.times % (pages / unit + 2) * unit;
        border.min(pages).saturating_add_signed(self.off).min(pages)
    }
}

#[derive(Clone, Debug)]
enum Area {
    Between(Spot, Spot),
    Length(Spot, u64),
    All,
}

impl Area {
    fn range(&self, pages: u64) -> Range {
        let (a, b) = match self {
            Area::Between(a, b) => (a.page(pages), b.page(pages)),
            Area::Length(a, length) => (a.page(pages), a.page(pages) + length),
            Area::All => (0, pages),
        };
        let first = a.min(b).min(pages - 1);
        self::pages(first, a.max(b).clamp(first + 1, pages))
    }
}

#[derive(Clone, Debug)]
enum Step {
    Set(Area, State),
    /// Every other page of the first few of an area, one at a time.
    Alternate(Area, State),
    Query(Area),
    Snapshot,
    Forget(prop::sample::Index),
}

fn state() -> impl Strategy<Value = State> {
    prop_oneof![Just(State::Shared), Just(State::Private)]
}

fn area(units: usize) -> impl Strategy<Value = Area> {
    let spot = move || (0..units, any::<u64>(), -2..=2i64).prop_map(|(unit, times, off)| Spot { unit, times, off });
    prop_oneof![
        4 => (spot(), spot()).prop_map(|(a, b)| Area::Between(a, b)),
        3 => (spot(), Just(1)).prop_map(|(a, length)| Area::Length(a, length)),
        3 => (spot(), 1..130u64).prop_map(|(a, length)| Area::Length(a, length)),
        1 => Just(Area::All),
    ]
}

fn steps(units: usize, count: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (area(units), state()).prop_map(|(area, state)| Step::Set(area, state)),
        1 => (area(units), state()).prop_map(|(area, state)| Step::Alternate(area, state)),
        4 => area(units).prop_map(Step::Query),
        2 => Just(Step::Snapshot),
        1 => any::<prop::sample::Index>().prop_map(Step::Forget),
    ];
    prop::collection::vec(step, 1..count)
}

/// Sizes in pages up to about three leaves.
fn small() -> impl Strategy<Value = u64> {
    let border = prop::sample::select(vec![64, BLOCK, 2 * BLOCK, LEAF, 2 * LEAF, 2 * LEAF + BLOCK]);
    prop_oneof![
        2 => (border, -66..=66i64).prop_map(|(border, off)| border.saturating_add_signed(off).max(1)),
        1 => 1..3 * LEAF,
        1 => 1..BLOCK,
    ]
}

/// Sizes in pages of a few branches and root words.
fn large() -> impl Strategy<Value = u64> {
    let border = prop::sample::select(vec![BRANCH, 3 * BRANCH, ROOT_WORD, TIB / PAGE_SIZE]);
    (
        border,
        prop::sample::select(vec![0, 1, 64, BLOCK, LEAF, BRANCH]),
        -2..=2i64,
    )
        .prop_map(|(border, more, off)| (border + more).saturating_add_signed(off))
}

fn check_query(map: &AttributeMap, model: &PageList, range: Range) -> Result<(), TestCaseError> {
    prop_assert_eq!(map.uniform(range), model.uniform(range));
    prop_assert_eq!(map.runs_in(range).collect::<Vec<_>>(), model.runs_in(range));
    for gpa in [range.gpa(), range.end() - 1] {
        let page = (gpa / PAGE_SIZE) as usize;
        prop_assert_eq!(map.state(gpa), model.states[page]);
        let block = page / BLOCK as usize;
        let of_block = &model.states[block * BLOCK as usize..];
        let of_block = &of_block[..of_block.len().min(BLOCK as usize)];
        let mixed = of_block.iter().any(|state| *state != of_block[0]);
        prop_assert_eq!(map.block_mixed(gpa), mixed);
        let stamp = model.stamps[block];
        prop_assert!(!map.changed_since(gpa, stamp));
        prop_assert!(stamp == 0 || map.changed_since(gpa, stamp - 1));
    }
    Ok(())
}

fn check_all(map: &AttributeMap, model: &PageList) -> Result<(), TestCaseError> {
    prop_assert_eq!(map.size(), model.all().size());
    prop_assert_eq!(map.generation(), model.generation);
    prop_assert_eq!(map.private_bytes(), model.private_bytes());
    prop_assert_eq!(map.runs().collect::<Vec<_>>(), model.runs_in(model.all()));
    for (block, stamp) in (0..).zip(&model.stamps) {
        let first = block * BLOCK;
        let range = pages(first, (first + BLOCK).min(model.states.len() as u64));
        prop_assert_eq!(map.block_mixed(range.gpa()), model.uniform(range).is_none());
        prop_assert!(!map.changed_since(range.gpa(), *stamp));
        prop_assert!(*stamp == 0 || map.changed_since(range.gpa(), stamp - 1));
    }
    Ok(())
}

fn check_snapshot(snapshot: &Snapshot, model: &PageList) -> Result<(), TestCaseError> {
    let all = model.all();
    prop_assert_eq!(snapshot.size(), all.size());
    prop_assert_eq!(snapshot.generation(), model.generation);
    prop_assert_eq!(snapshot.private_bytes(), model.private_bytes());
    prop_assert_eq!(snapshot.runs().collect::<Vec<_>>(), model.runs_in(all));
    prop_assert_eq!(snapshot.uniform(all), model.uniform(all));
    prop_assert_eq!(snapshot.state(all.end() - 1), model.states[model.states.len() - 1]);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_a_list_of_pages(size in small(), initial in state(), steps in steps(4, 40)) {
        let mut map = AttributeMap::new(size * PAGE_SIZE, initial);
        let mut model = PageList::new(size, initial);
        let mut kept: Vec<(Snapshot, PageList)> = Vec::new();
        for step in steps {
            match step {
                Step::Set(area, to) => {
                    let range = area.range(size);
                    prop_assert_eq!(map.set(range, to), model.set(range, to));
                    prop_assert_eq!(map.uniform(range), Some(to));
                    check_query(&map, &model, range)?;
                }
                Step::Alternate(area, to) => {
                    let (first, end) = span(area.range(size));
                    for page in (first..end).step_by(2).take(300) {
                        let range = pages(page, page + 1);
                        prop_assert_eq!(map.set(range, to), model.set(range, to));
                    }
                }
                Step::Query(area) => check_query(&map, &model, area.range(size))?,
                Step::Snapshot => kept.push((map.snapshot(), model.clone())),
                Step::Forget(index) => {
                    if !kept.is_empty() {
                        let (snapshot, then) = kept.swap_remove(index.index(kept.len()));
                        check_snapshot(&snapshot, &then)?;
                    }
                }
            }
            prop_assert_eq!(map.generation(), model.generation);
        }
        check_all(&map, &model)?;
        for (snapshot, then) in &kept {
            check_snapshot(snapshot, then)?;
        }
    }

    #[test]
    fn ranges_relate_as_sets_of_pages_do(a in 0..40u64, b in 1..40u64, c in 0..40u64, d in 1..40u64) {
        let (x, y) = (pages(a, a + b), pages(c, c + d));
        let both: Vec<u64> = (0..100).filter(|page| {
            x.contains(page * PAGE_SIZE) && y.contains(page * PAGE_SIZE + PAGE_SIZE - 1)
        }).collect();
        prop_assert_eq!(x.pages(), b);
        prop_assert_eq!(x.overlaps(&y), !both.is_empty());
        let found = x.intersect(&y).map(span);
        prop_assert_eq!(found, both.first().zip(both.last()).map(|(first, last)| (*first, last + 1)));
    }
}

proptest! {
    // A change of all of a large memory takes milliseconds in a debug build.
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_a_list_of_runs(size in large(), initial in state(), steps in steps(6, 30)) {
        let mut map = AttributeMap::new(size * PAGE_SIZE, initial);
        let mut model = RunList(vec![run(0, size, initial)]);
        let mut kept: Vec<(Snapshot, RunList)> = Vec::new();
        for step in steps {
            match step {
                Step::Set(area, to) => {
                    let range = area.range(size);
                    let generation = map.generation();
                    let changed = map.set(range, to);
                    prop_assert_eq!(changed, model.set(range, to));
                    prop_assert_eq!(map.generation(), generation + u64::from(changed > 0));
                    prop_assert_eq!(map.uniform(range), Some(to));
                }
                Step::Alternate(area, to) => {
                    let (first, end) = span(area.range(size));
                    for page in (first..end).step_by(2).take(100) {
                        let range = pages(page, page + 1);
                        prop_assert_eq!(map.set(range, to), model.set(range, to));
                    }
                }
                Step::Query(area) => {
                    let range = area.range(size);
                    prop_assert_eq!(map.uniform(range), model.uniform(range));
                    prop_assert_eq!(map.runs_in(range).collect::<Vec<_>>(), model.runs_in(range));
                }
                Step::Snapshot => kept.push((map.snapshot(), model.clone())),
                Step::Forget(index) => {
                    if !kept.is_empty() {
                        let (snapshot, then) = kept.swap_remove(index.index(kept.len()));
                        prop_assert_eq!(snapshot.runs().collect::<Vec<_>>(), then.0);
                    }
                }
            }
        }
        prop_assert_eq!(map.runs().collect::<Vec<_>>(), model.0.clone());
        prop_assert_eq!(map.private_bytes(), model.private_bytes());
        for (snapshot, then) in &kept {
            prop_assert_eq!(snapshot.runs().collect::<Vec<_>>(), then.0.clone());
            prop_assert_eq!(snapshot.private_bytes(), then.private_bytes());
        }
    }
}

#[test]
fn a_range_is_aligned_not_empty_and_does_not_wrap() {
    let top = u64::MAX - (PAGE_SIZE - 1);
    for (gpa, size) in [
        (0, 0),
        (PAGE_SIZE, 0),
        (1, PAGE_SIZE),
        (PAGE_SIZE / 2, PAGE_SIZE),
        (0, 1),
        (0, PAGE_SIZE + 1),
        (0, u64::MAX),
        (u64::MAX, 0),
        (u64::MAX, PAGE_SIZE),
        (u64::MAX, u64::MAX),
        // Ends at 2^64 exactly.
        (top, PAGE_SIZE),
        (PAGE_SIZE, top),
        (top, top),
    ] {
        assert_eq!(Range::new(gpa, size), None, "{gpa:#x} {size:#x}");
    }
    let last = Range::new(top - PAGE_SIZE, PAGE_SIZE).expect("ends below 2^64");
    assert_eq!((last.gpa(), last.end(), last.pages()), (top - PAGE_SIZE, top, 1));
    assert!(last.contains(top - 1) && !last.contains(top) && !last.contains(u64::MAX));
    assert_eq!(Range::new(0, top).map(|range| range.size()), Some(top));
}

#[test]
fn names() {
    assert_eq!(pages(1, 3).to_string(), "[0x1000, 0x3000)");
    assert_eq!(State::Private.to_string(), "private");
    assert_eq!(format!("{:>8}", State::Shared), "  shared");
    assert_eq!(State::Private.other(), State::Shared);
    assert_eq!(State::Shared.other().as_str(), "private");
    let debug = format!("{:?}", AttributeMap::new(TIB, State::Shared));
    assert_eq!(
        debug,
        "AttributeMap { size: 1099511627776, private_bytes: 0, generation: 0, .. }"
    );
}

#[test]
fn only_a_change_is_a_generation_and_only_its_blocks_are_stamped() {
    let mut map = AttributeMap::new(4 * BLOCK * PAGE_SIZE, State::Shared);
    let blocks = |map: &AttributeMap, since| {
        let gpas = (0..4).map(|block| (block * BLOCK + 7) * PAGE_SIZE + 5);
        gpas.map(|gpa| map.changed_since(gpa, since)).collect::<Vec<_>>()
    };
    assert_eq!(map.set(pages(0, 4 * BLOCK), State::Shared), 0);
    assert_eq!(map.generation(), 0);
    assert_eq!(blocks(&map, 0), [false; 4]);

    assert_eq!(map.set(pages(BLOCK, BLOCK + 1), State::Private), PAGE_SIZE);
    assert_eq!(map.generation(), 1);
    assert_eq!(blocks(&map, 0), [false, true, false, false]);
    assert_eq!(blocks(&map, 1), [false; 4]);

    // One generation however many blocks; of block 1 only what is not private yet counts.
    assert_eq!(map.set(pages(BLOCK, 2 * BLOCK + 1), State::Private), BLOCK * PAGE_SIZE);
    assert_eq!(map.generation(), 2);
    assert_eq!(blocks(&map, 1), [false, true, true, false]);

    // A block that is all private already is not stamped by a change around it.
    assert_eq!(
        map.set(pages(0, 4 * BLOCK), State::Private),
        (3 * BLOCK - 1) * PAGE_SIZE
    );
    assert_eq!(blocks(&map, 2), [true, false, true, true]);

    // Changed back is changed.
    map.set(pages(3, 4), State::Shared);
    map.set(pages(3, 4), State::Private);
    assert_eq!(map.generation(), 5);
    assert_eq!(blocks(&map, 3), [true, false, false, false]);
    assert_eq!(map.uniform(pages(0, 4 * BLOCK)), Some(State::Private));
}

#[test]
fn the_last_block_is_mixed_until_its_last_page_changes() {
    for size in [2, 63, 64, 65, 130, BLOCK - 1, BLOCK, BLOCK + 3] {
        let mut map = AttributeMap::new(size * PAGE_SIZE, State::Shared);
        let first = (size - 1) / BLOCK * BLOCK;
        for to in [State::Private, State::Shared] {
            for page in first..size {
                assert_eq!(map.set(pages(page, page + 1), to), PAGE_SIZE);
                let mixed = map.block_mixed(first * PAGE_SIZE);
                assert_eq!(mixed, page + 1 < size, "page {page} of {size} to {to}");
            }
            assert_eq!(map.uniform(pages(first, size)), Some(to));
        }
    }
}

#[test]
fn the_whole_of_a_tebibyte() {
    let mut map = AttributeMap::new(TIB, State::Shared);
    let all = Range::new(0, TIB).expect("a valid range");
    for (i, to) in (1..).zip([State::Private, State::Shared, State::Private]) {
        assert_eq!(map.set(all, to), TIB);
        assert_eq!(map.set(all, to), 0);
        assert_eq!(map.generation(), i);
        assert_eq!(map.uniform(all), Some(to));
        assert_eq!(map.runs().collect::<Vec<_>>(), [Run { range: all, state: to }]);
        assert_eq!(map.private_bytes(), if to == State::Private { TIB } else { 0 });
        assert!(map.changed_since(0, i - 1) && map.changed_since(TIB - 1, i - 1));
    }
    let hole = pages(TIB / PAGE_SIZE - 1, TIB / PAGE_SIZE);
    assert_eq!(map.set(hole, State::Shared), PAGE_SIZE);
    assert_eq!(map.uniform(all), None);
    assert_eq!(map.uniform(pages(0, TIB / PAGE_SIZE - 1)), Some(State::Private));
    assert_eq!(map.set(all, State::Private), PAGE_SIZE);
}

#[test]
fn memory_is_bounded_and_given_back() {
    let all = Range::new(0, TIB).expect("a valid range");
    let mut map = AttributeMap::new(TIB, State::Shared);
    let empty = map.memory();
    assert!(empty >= (TIB >> 21) as usize * 8, "the stamps alone: {empty}");

    // Whole blocks need no bits.
    for first in (0..TIB / PAGE_SIZE).step_by(2 * BLOCK as usize) {
        map.set(pages(first, first + BLOCK), State::Private);
    }
    assert_eq!(map.memory(), empty);
    assert_eq!(map.runs().count() as u64, TIB / PAGE_SIZE / BLOCK);

    // The worst case: nothing grows beyond a mixed block in each leaf.
    for first in (0..TIB / PAGE_SIZE).step_by(LEAF as usize) {
        map.set(pages(first + 1, first + 2), State::Shared);
    }
    let worst = map.memory();
    assert!(worst >= empty + (32 << 20), "one bit for each page: {worst}");
    assert!(worst <= 37 << 20, "{worst}");
    for page in (0..2 * LEAF).step_by(2) {
        map.set(pages(page, page + 1), State::Private);
        map.set(pages(page + 1, page + 2), State::Shared);
    }
    assert_eq!(map.runs_in(pages(0, 2 * LEAF)).count() as u64, 2 * LEAF);
    assert_eq!(map.memory(), worst);

    // One leaf's bits are kept for the next leaf that needs some.
    map.set(all, State::Shared);
    let spare = map.memory() - empty;
    assert!((4096..=8192).contains(&spare), "{spare}");
    for _ in 0..1000 {
        map.set(pages(5, 6), State::Private);
        map.set(pages(5, 6), State::Shared);
    }
    assert_eq!(map.memory() - empty, spare);
}

#[test]
fn a_snapshot_stays_as_it_was_in_other_threads_too() {
    fn shareable<T: Send + Sync + 'static>(value: T) -> T {
        value
    }
    let size = 2 * LEAF + 100;
    let mut map = shareable(AttributeMap::new(size * PAGE_SIZE, State::Shared));
    let mut readers = Vec::new();
    for round in 0..50 {
        let first = round * 1201;
        map.set(pages(first, first + 700), State::Private);
        let snapshot = shareable(map.snapshot());
        let expected: Vec<Run> = map.runs().collect();
        readers.push(std::thread::spawn(move || {
            for _ in 0..20 {
                assert!(snapshot.runs().eq(expected.iter().copied()));
            }
        }));
        for page in first..first + 64 {
            map.set(pages(page, page + 1), State::Shared);
        }
    }
    for reader in readers {
        assert!(reader.join().is_ok());
    }
}

#[test]
fn what_a_range_was_can_be_restored_from_its_runs() {
    let mut map = AttributeMap::new(LEAF * PAGE_SIZE, State::Shared);
    map.set(pages(3, 70), State::Private);
    map.set(pages(500, 1030), State::Private);
    let before = map.snapshot();
    let range = pages(60, 1025);
    let previous: Vec<Run> = map.runs_in(range).collect();
    map.set(range, State::Shared);
    for run in previous {
        map.set(run.range, run.state);
    }
    assert!(map.runs().eq(before.runs()));
    assert_eq!(map.private_bytes(), before.private_bytes());
}

mod outside {
    use super::*;

    fn map() -> AttributeMap {
        AttributeMap::new(3 * PAGE_SIZE, State::Shared)
    }

    #[test]
    #[should_panic(expected = "gpa 0x3000 lies outside of memory, which ends at 0x3000")]
    fn state() {
        map().state(0x3000);
    }

    #[test]
    #[should_panic(expected = "range [0x2000, 0x4000) lies outside of memory")]
    fn set() {
        map().set(pages(2, 4), State::Private);
    }

    #[test]
    #[should_panic(expected = "range [0x3000, 0x4000) lies outside of memory")]
    fn uniform() {
        map().uniform(pages(3, 4));
    }

    #[test]
    #[should_panic(expected = "lies outside of memory")]
    fn runs_in() {
        let _ = map().runs_in(pages(0, 4)).count();
    }

    #[test]
    #[should_panic(expected = "lies outside of memory")]
    fn block_mixed() {
        map().block_mixed(u64::MAX);
    }

    #[test]
    #[should_panic(expected = "lies outside of memory")]
    fn changed_since() {
        map().changed_since(0x3000, 0);
    }

    #[test]
    #[should_panic(expected = "memory size 0x0 is not a positive multiple")]
    fn no_memory() {
        AttributeMap::new(0, State::Shared);
    }

    #[test]
    #[should_panic(expected = "memory size 0x1001 is not a positive multiple")]
    fn part_of_a_page() {
        AttributeMap::new(0x1001, State::Shared);
    }
}
