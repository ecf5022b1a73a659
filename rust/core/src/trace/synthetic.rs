//! Generated traces of any length, to try policies and trace readers on.

use kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE;

use super::about::About;
use super::data::Trace;
use crate::allocation::reserve;
use crate::errno::Errno;
use crate::error::Failure;
use crate::events::event::{Event, Kind, Outcome, RecordedDecision};
use crate::input::Watch;
use crate::memory::address::{PAGE_SIZE, Range, State};
use crate::policy::decision::Decision;
use crate::policy::map_gpa_range;
use crate::policy::trial::Model;

const MEMORY: u64 = 1 << 30;
const BLOCK: u64 = 2 << 20;
/// How many requests are made between two calls of the watch.
const BETWEEN_WATCHES: u64 = 1 << 16;
const BUFFER: u64 = 256 << 10;
/// Where the guest has its bounce buffers, its rings, pages that it converts between private and shared, and memory
/// that it balloons: gpa and size.
const BUFFERS: (u64, u64) = (64 << 20, 64 << 20);
const RINGS: (u64, u64) = (256 << 20, 16 << 20);
const ALTERNATING: (u64, u64) = (300 << 20, 8 * PAGE_SIZE);
const BALLOON: (u64, u64) = (512 << 20, 256 << 20);

/// A trace of `requests` requests by a guest of 1 GiB that is private at first. All are converted as asked. The same
/// arguments give the same trace. Of 100 requests about 60 convert bounce buffers (explicit), 25 touch pages of rings
/// (implicit), ten touch the same few pages as private and as shared (implicit), and five convert whole 2 MiB blocks
/// (explicit).
///
/// # Errors
/// That of `watch`, which is called again and again; inside, ENOMEM.
pub fn synthetic(requests: u64, seed: u64, vcpus: u32, watch: &mut Watch<'_>) -> Result<Result<Trace, Errno>, Failure> {
    let about = About::whole(MEMORY, State::Private);
    let mut model = about.model();
    let mut random = Random(seed);
    let mut time = 0;
    let mut event = |sequence| {
        let (kind, (start, size), unit) = match random.below(100) {
            0..60 => (Kind::Explicit, BUFFERS, BUFFER),
            60..85 => (Kind::Implicit, RINGS, PAGE_SIZE),
            85..95 => (Kind::Implicit, ALTERNATING, PAGE_SIZE),
            _ => (Kind::Explicit, BALLOON, BLOCK),
        };
        let gpa = start + random.below(size / unit) * unit;
        time += 1_000 + random.below(20_000);
        complete(
            &mut model,
            Event {
                sequence,
                time,
                vcpu: random.below(vcpus.max(1).into()) as u32,
                kind,
                gpa,
                size: unit,
                rip: 0xffff_ffff_8100_0000 + random.below(4096) * 16,
                latency: 2_000 + random.below(8_000),
                ..BLANK
            },
        )
    };
    let mut events = Vec::new();
    if let Err(errno) = reserve(&mut events, usize::try_from(requests).unwrap_or(usize::MAX)) {
        return Ok(Err(errno));
    }
    for sequence in 0..requests {
        if sequence % BETWEEN_WATCHES == 0 {
            watch()?;
        }
        events.push(event(sequence));
    }
    Ok(Ok(Trace {
        about,
        events,
        truncated: false,
    }))
}

const BLANK: Event = Event {
    device: None,
    sequence: 0,
    time: 0,
    vcpu: 0,
    kind: Kind::Implicit,
    gpa: 0,
    size: 0,
    to: State::Shared,
    state: None,
    page_size: 0,
    raw: 0,
    flags: 0,
    rip: 0,
    repeats: 0,
    decision: RecordedDecision::none(State::Shared),
    outcome: Outcome::Converted,
    done_gpa: 0,
    done_size: 0,
    done_to: State::Shared,
    changed: 0,
    errno: 0,
    latency: 0,
};

/// Fills in the rest of a request: it is for the state that its pages are not in, and it is converted.
fn complete(model: &mut Model, event: Event) -> Event {
    let Some(range) = Range::new(event.gpa, event.size) else {
        return event;
    };
    let state = model.map().state(range.gpa());
    let to = state.other();
    let explicit = event.kind == Kind::Explicit;
    let page_size = if range.size() == BLOCK { BLOCK } else { PAGE_SIZE };
    let flags = if to == State::Private {
        KVM_MEMORY_EXIT_FLAG_PRIVATE
    } else {
        0
    };
    Event {
        to,
        state: Some(state),
        page_size: if explicit { page_size as u32 } else { 0 },
        raw: match explicit {
            true => map_gpa_range::attributes(to, page_size).unwrap_or_default() as u32,
            false => 0,
        },
        flags: if explicit { 0 } else { flags },
        rip: if explicit { 0 } else { event.rip },
        decision: RecordedDecision::of(&Decision::as_asked(), range, to),
        done_gpa: range.gpa(),
        done_size: range.size(),
        done_to: to,
        changed: model.set(range, to),
        ..event
    }
}

/// SplitMix64: short, and gives the same numbers on every platform.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `end`. The bias of the remainder does not matter for an `end` this small.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
