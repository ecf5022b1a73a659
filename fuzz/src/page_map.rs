//! The page map, against the list of pages of the core's tests.

use arbitrary::{Result, Unstructured};
use pagegate_core::memory::address::{PAGE_SIZE, Range, Run, State};
use pagegate_core::memory::page_map::{AttributeMap, Snapshot};

#[path = "../../rust/core/tests/page_map/models.rs"]
#[allow(dead_code)]
mod models;

use models::{BLOCK, LEAF, PageList, pages, span};

/// More changes than this find nothing new, and take the model long.
const STEPS: usize = 64;
const SNAPSHOTS: usize = 4;

/// Whether memory has more than some blocks, which takes the model long; its pages, the state at first, and changes.
pub fn run(data: &[u8]) -> bool {
    check(&mut Unstructured::new(data)).unwrap_or(false)
}

fn check(data: &mut Unstructured<'_>) -> Result<bool> {
    let most = if data.ratio(1, 8)? { 2 * LEAF + BLOCK } else { 4 * BLOCK };
    let size = data.int_in_range(1..=most)?;
    let initial = state(data)?;
    let mut map = AttributeMap::new(size * PAGE_SIZE, initial);
    let mut model = PageList::new(size, initial);
    let mut kept: Vec<(Snapshot, PageList)> = Vec::new();
    for _ in 0..STEPS {
        if data.is_empty() {
            break;
        }
        let range = range(data, size)?;
        match data.arbitrary::<u8>()? % 8 {
            0 if kept.len() < SNAPSHOTS => kept.push((map.snapshot(), model.clone())),
            0 => kept.clear(),
            1 => {
                map.disturb(range);
                disturb(&mut model, range);
            }
            step => {
                let to = if step % 2 == 0 { State::Private } else { State::Shared };
                assert_eq!(map.set(range, to), model.set(range, to));
                assert_eq!(map.uniform(range), Some(to));
            }
        }
        compare(&map, &model, range);
    }
    compare(&map, &model, model.all());
    assert_eq!(map.private_bytes(), model.private_bytes());
    for (block, stamp) in (0..).zip(&model.stamps) {
        let gpa = block * BLOCK * PAGE_SIZE;
        assert!(!map.changed_since(gpa, *stamp));
        assert!(*stamp == 0 || map.changed_since(gpa, stamp - 1));
    }
    for (snapshot, then) in kept {
        assert_eq!(snapshot.runs().collect::<Vec<Run>>(), then.runs_in(then.all()));
        let found = (snapshot.private_bytes(), snapshot.generation());
        assert_eq!(found, (then.private_bytes(), then.generation));
    }
    Ok(model.generation > 0)
}

fn state(data: &mut Unstructured<'_>) -> Result<State> {
    Ok(if data.arbitrary()? {
        State::Private
    } else {
        State::Shared
    })
}

fn range(data: &mut Unstructured<'_>, size: u64) -> Result<Range> {
    let first = data.int_in_range(0..=size - 1)?;
    let end = match data.arbitrary::<u8>()? {
        0 => data.int_in_range(first + 1..=size)?,
        few => (first + u64::from(few)).min(size),
    };
    Ok(pages(first, end))
}

fn disturb(model: &mut PageList, range: Range) {
    let (first, end) = span(range);
    model.generation += 1;
    model.stamps[(first / BLOCK) as usize..end.div_ceil(BLOCK) as usize].fill(model.generation);
}

fn compare(map: &AttributeMap, model: &PageList, range: Range) {
    assert_eq!(map.uniform(range), model.uniform(range));
    assert_eq!(map.runs_in(range).collect::<Vec<Run>>(), model.runs_in(range));
    for gpa in [range.gpa(), range.end() - 1] {
        assert_eq!(map.state(gpa), model.states[(gpa / PAGE_SIZE) as usize]);
    }
    assert_eq!(map.generation(), model.generation);
}
