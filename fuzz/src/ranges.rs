//! Ranges and views, against arithmetic in 128 bits.

use arbitrary::{Result, Unstructured};
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use pagegate_core::memory::views::{Place, ViewBit, Views};

/// Two ranges, an address, and memory: its end, its hole and its view bit.
pub fn run(data: &[u8]) -> bool {
    check(&mut Unstructured::new(data)).unwrap_or(false)
}

fn check(data: &mut Unstructured<'_>) -> Result<bool> {
    let (a, b) = (range(data)?, range(data)?);
    let gpa = data.arbitrary()?;
    if let (Some(a), Some(b)) = (a, b) {
        relations(a, b, gpa);
    }
    let views = views(data)?;
    ram(&views);
    place(&views, gpa);
    for range in [a, b].into_iter().flatten() {
        inside(&views, range);
    }
    Ok(a.is_some() && b.is_some())
}

/// A range of any two numbers, mostly rounded to pages.
fn range(data: &mut Unstructured<'_>) -> Result<Option<Range>> {
    let (mut gpa, mut size): (u64, u64) = data.arbitrary()?;
    if data.arbitrary::<u8>()? > 0 {
        gpa -= gpa % PAGE_SIZE;
        size -= size % PAGE_SIZE;
    }
    let end = u128::from(gpa) + u128::from(size);
    let valid = gpa % PAGE_SIZE == 0 && size % PAGE_SIZE == 0 && size > 0 && end < 1 << 64;
    let range = Range::new(gpa, size);
    assert_eq!(range.is_some(), valid);
    if let Some(range) = range {
        assert_eq!((range.gpa(), range.size(), u128::from(range.end())), (gpa, size, end));
        assert_eq!(range.pages(), size / PAGE_SIZE);
    }
    Ok(range)
}

fn relations(a: Range, b: Range, gpa: u64) {
    let (start, end) = (a.gpa().max(b.gpa()), a.end().min(b.end()));
    assert_eq!(a.contains(gpa), (a.gpa()..a.end()).contains(&gpa));
    assert_eq!(a.overlaps(&b), start < end);
    let common = a.intersect(&b);
    assert_eq!(
        common.map(|common| (common.gpa(), common.end())),
        (start < end).then_some((start, end))
    );
    assert_eq!((common, a.overlaps(&b)), (b.intersect(&a), b.overlaps(&a)));
}

/// Memory as a machine may have it: its end is not above the view bit, and the hole is inside.
fn views(data: &mut Unstructured<'_>) -> Result<Views> {
    let bit = data.int_in_range(12..=51_u32)?;
    let end = data.int_in_range(1..=1_u64 << (bit - 12))? * PAGE_SIZE;
    let hole = range(data)?.filter(|hole| hole.gpa() > 0 && hole.end() < end);
    let set = if data.arbitrary()? {
        State::Private
    } else {
        State::Shared
    };
    let split = data.arbitrary()?;
    Ok(Views::new(end, hole, Some(ViewBit { bit, set }).filter(|_| split)))
}

fn ram(views: &Views) {
    let ram = views.ram();
    assert_eq!(ram.iter().map(Range::size).sum::<u64>(), views.size());
    assert_eq!(ram.first().map(Range::gpa), Some(0));
    assert_eq!(ram.last().map(Range::end), Some(views.memory_end()));
    for range in ram {
        assert!(views.holds(range));
    }
    assert_eq!(views.end(), views.memory_end() + views.mask());
}

fn is_memory(views: &Views, gpa: u64) -> bool {
    views.ram().iter().any(|range| range.contains(gpa))
}

fn place(views: &Views, gpa: u64) {
    let found = views.locate(gpa);
    let stripped = gpa & !views.mask();
    assert_eq!(
        found.map(|place| place.gpa),
        is_memory(views, stripped).then_some(stripped)
    );
    let Some(Place { gpa: inside, view }) = found else {
        return;
    };
    assert_eq!(view.is_some(), views.split());
    for state in [State::Shared, State::Private] {
        let address = views.address(inside, state);
        let view = views.split().then_some(state);
        assert_eq!(views.locate(address), Some(Place { gpa: inside, view }));
    }
    assert_eq!(view.map_or(inside, |state| views.address(inside, state)), gpa);
}

fn inside(views: &Views, range: Range) {
    let held = views.ram().iter().any(|ram| ram.intersect(&range) == Some(range));
    assert_eq!(views.holds(range), held);
    // A range whose first address has the view bit is one without it.
    let found = views.range(range.gpa(), range.size());
    let stripped = Range::new(range.gpa() & !views.mask(), range.size());
    assert_eq!(found, stripped.filter(|range| views.holds(*range)));
    if !held {
        return;
    }
    for state in [State::Shared, State::Private] {
        let view = views.view(range, state);
        assert_eq!(
            (view.gpa(), view.size()),
            (views.address(range.gpa(), state), range.size())
        );
        assert_eq!(views.range(view.gpa(), view.size()), Some(range));
    }
}
