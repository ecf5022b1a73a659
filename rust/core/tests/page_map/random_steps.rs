//! Random sequences of changes, questions and snapshots against the models.

use pagegate_core::memory::{address::*, page_map::*};
use proptest::prelude::*;

use crate::models::*;

/// A page near a multiple of one of the map's units.
#[derive(Clone, Debug)]
struct NearBorder {
    unit: usize,
    times: u64,
    off: i64,
}

impl NearBorder {
    fn page(&self, pages: u64) -> u64 {
        let unit = [1, 64, BLOCK, LEAF, BRANCH, ROOT_WORD][self.unit];
        // The end of memory counts as a border of every unit.
        let border = self.times % (pages / unit + 2) * unit;
        border.min(pages).saturating_add_signed(self.off).min(pages)
    }
}

#[derive(Clone, Debug)]
enum Area {
    Between(NearBorder, NearBorder),
    Length(NearBorder, u64),
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
    let page =
        move || (0..units, any::<u64>(), -2..=2i64).prop_map(|(unit, times, off)| NearBorder { unit, times, off });
    prop_oneof![
        4 => (page(), page()).prop_map(|(a, b)| Area::Between(a, b)),
        3 => (page(), Just(1)).prop_map(|(a, length)| Area::Length(a, length)),
        3 => (page(), 1..130u64).prop_map(|(a, length)| Area::Length(a, length)),
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
        prop_assert_eq!(map.uniform(range), model.uniform(range));
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
