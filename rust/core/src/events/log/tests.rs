//! Readers against vCPUs that publish: whatever was read is whole, in order, and stays as it was.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::sync::atomic::AtomicUsize;

use arrow_array::cast::AsArray;
use arrow_array::types::UInt64Type;

use super::*;
use crate::events::event::Kind;
use crate::memory::address::{PAGE_SIZE, Range, State};
use crate::policy::decision::Convert;

/// Enough that chunks are reused.
const EVENTS: u64 = 5 * ROWS as u64 / 2;

/// Publishes the `n`th event of this vCPU, whose fields all say so.
fn publish(log: &EventLog, writer: &mut Writer, n: u64) {
    let gpa = n * PAGE_SIZE;
    let to = if n.is_multiple_of(2) {
        State::Private
    } else {
        State::Shared
    };
    writer.begin(&Asked {
        time: n,
        kind: Kind::Implicit,
        gpa,
        size: PAGE_SIZE,
        to,
        state: Some(to.other()),
        page_size: 0,
        raw: 0,
        flags: n as u32,
        rip: n,
        repeats: n as u32,
    });
    let range = Range::new(gpa, PAGE_SIZE).unwrap();
    writer.decided(&RecordedDecision::convert(&Convert::default(), range, to));
    let done = Done {
        gpa,
        size: PAGE_SIZE,
        to,
        changed: n,
    };
    writer.ended(Outcome::Converted, 0, &done);
    log.publish(writer, n);
}

fn check(event: &Event) {
    let n = event.time;
    let words = [
        event.gpa / PAGE_SIZE,
        event.rip,
        event.done_gpa / PAGE_SIZE,
        event.changed,
        event.latency,
    ];
    assert_eq!(words, [n; 5], "{event:?}");
    assert_eq!([event.flags, event.repeats], [n as u32; 2], "{event:?}");
    assert_eq!(event.to == State::Private, n.is_multiple_of(2), "{event:?}");
    assert_eq!((event.done_to, event.decision.to), (event.to, event.to), "{event:?}");
}

type Columns = [Vec<u64>; 2];

/// The sequence numbers of a batch, and what was changed, which is the same number as the latency.
fn columns(batch: &RecordBatch) -> Columns {
    ["sequence", "changed"].map(|name| {
        let column = batch.column_by_name(name).unwrap();
        column.as_primitive::<UInt64Type>().values().to_vec()
    })
}

/// Calls `read` while each vCPU publishes [`EVENTS`], and once after that.
fn while_published(log: &EventLog, writers: Vec<Writer>, mut read: impl FnMut()) {
    let running = AtomicUsize::new(writers.len());
    std::thread::scope(|scope| {
        for mut writer in writers {
            let running = &running;
            scope.spawn(move || {
                for n in 0..EVENTS {
                    publish(log, &mut writer, n);
                }
                running.fetch_sub(1, Ordering::Release);
            });
        }
        loop {
            let over = running.load(Ordering::Acquire) == 0;
            read();
            if over {
                break;
            }
        }
    });
}

#[test]
fn a_reader_that_goes_on_after_the_last_event_misses_none() {
    for vcpus in [1, 2] {
        let total = vcpus as u64 * EVENTS;
        let (log, writers) = EventLog::new(total as usize, vcpus);
        let mut next = 0;
        while_published(&log, writers, || {
            for event in log.since(next) {
                assert_eq!(event.sequence, next);
                check(&event);
                next += 1;
            }
        });
        assert_eq!((next, log.total(), log.kept() as u64), (total, total, total));
    }
}

/// Few events, so that most reads come while one is published.
#[test]
fn a_read_in_the_middle_of_few_events_leaves_none_out() {
    const EACH: u64 = 3;
    for _ in 0..if cfg!(miri) { 10 } else { 1000 } {
        let (log, writers) = EventLog::new(100, 2);
        std::thread::scope(|scope| {
            for mut writer in writers {
                let log = &log;
                scope.spawn(move || (0..EACH).for_each(|n| publish(log, &mut writer, n)));
            }
            let mut next = 0;
            while next < 2 * EACH {
                for event in log.since(next) {
                    assert_eq!(event.sequence, next);
                    next += 1;
                }
                std::thread::yield_now();
            }
        });
    }
}

#[test]
fn events_of_chunks_that_are_reused_are_whole_and_in_order() {
    let capacity = ROWS / 2;
    let (log, writers) = EventLog::new(capacity, 2);
    while_published(&log, writers, || {
        let events = log.since(0);
        assert!(events.len() <= capacity);
        assert!(events.is_sorted_by(|a, b| a.sequence < b.sequence));
        events.iter().for_each(check);
    });
    assert_eq!((log.total(), log.kept()), (2 * EVENTS, capacity));
}

#[test]
fn a_batch_stays_as_it_was_while_chunks_are_reused() {
    let (log, writers) = EventLog::new(10, 1);
    let mut batches = VecDeque::new();
    let unchanged = |(batch, then): &(RecordBatch, Columns)| assert_eq!(columns(batch), *then);
    while_published(&log, writers, || {
        for batch in log.batches_since(0) {
            let then = columns(&batch);
            // With one vCPU an event's latency is its number.
            assert_eq!(then[0], then[1]);
            batches.push_back((batch, then));
        }
        if batches.len() > 4 {
            batches.pop_front().iter().for_each(unchanged);
        }
    });
    assert!(!batches.is_empty());
    batches.iter().for_each(unchanged);
}
