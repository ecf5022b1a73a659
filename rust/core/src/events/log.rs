//! The log: a bounded ring of chunks for each vCPU. Only its vCPU writes to it, and readers never block the vCPU for
//! longer than it takes to copy a list of chunks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::RecordBatch;
use parking_lot::Mutex;

use super::chunk::{Chunk, Draft, ROWS};
use super::columns::Cells;
use super::event::{Asked, ByDevice, Done, Event, NO_VCPU, Outcome, RecordedDecision};
use super::table;
use crate::errno::Errno;

/// The events of one vCPU. Shares no cache line with another vCPU's, because each request writes to it.
#[repr(align(128))]
struct Ring {
    /// The last one is being written. Locked only for a moment, by the vCPU once a chunk.
    chunks: Mutex<VecDeque<Arc<Chunk>>>,
    /// While the vCPU publishes an event: a number that is not above the event's. Else [`NONE_ARRIVING`].
    arriving: AtomicU64,
    /// How many events it keeps.
    capacity: usize,
}

const NONE_ARRIVING: u64 = u64::MAX;

/// The last events of each vCPU. When a ring is full, its oldest are dropped.
pub struct EventLog {
    rings: Vec<Ring>,
    /// Of devices, and of missing pages.
    others: SideRing,
    /// Requests that no policy saw: cheap for a guest, so they take no room from the others.
    malformed: SideRing,
    sequence: Sequence,
}

/// Events that are written by whichever thread's turn it is.
struct SideRing {
    ring: Ring,
    /// Locked before the ring's chunks. With it, how many events were written.
    writer: Mutex<(Writer, u64)>,
}

/// How many malformed requests the log keeps, if it keeps as many others.
const MALFORMED_KEPT: usize = 4096;

/// The number of the next event of any vCPU. Shares no cache line with anything else.
#[repr(align(128))]
#[derive(Default)]
struct Sequence(AtomicU64);

/// Writes the events of one vCPU, one at a time: each field when it becomes known, and then the event is published.
pub(crate) struct Writer {
    vcpu: u32,
    /// A number that is not above its next event's.
    next: u64,
    /// The chunk that the present or the next event is written to; `None` where no events are kept.
    chunk: Option<Arc<Chunk>>,
    /// The event's row: the first that is not published.
    row: usize,
    stage: Stage,
}

/// How far the present event has been written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// There is no event.
    Nothing,
    Asked,
    Decided,
    Ended,
}

/// The rows `[from, to)` of a chunk.
struct Part {
    chunk: Arc<Chunk>,
    from: usize,
    to: usize,
}

impl EventLog {
    /// A log of at most `capacity` events of all vCPUs together, 0 for none, and each vCPU's writer. As many of devices
    /// are kept as of one vCPU, and malformed requests up to [`MALFORMED_KEPT`]. The memory for them is allocated as they
    /// come; events for which there is none are dropped.
    pub(crate) fn new(capacity: usize, vcpus: usize) -> (Self, Vec<Writer>) {
        let malformed = capacity.min(MALFORMED_KEPT);
        let capacity = capacity.div_ceil(vcpus.max(1));
        let log = Self {
            rings: (0..vcpus).map(|_| Ring::new(capacity)).collect(),
            others: SideRing::new(capacity),
            malformed: SideRing::new(malformed),
            sequence: Sequence::default(),
        };
        let writer = |vcpu| Writer {
            vcpu,
            next: 0,
            chunk: log.rings[vcpu as usize].open_chunk(),
            row: 0,
            stage: Stage::Nothing,
        };
        let writers = (0..vcpus as u32).map(writer).collect();
        (log, writers)
    }

    /// Completes the present event and makes it visible to readers. Does not wait for them.
    #[inline]
    pub(crate) fn publish(&self, writer: &mut Writer, latency: u64) {
        if let Some(ring) = self.rings.get(writer.vcpu as usize) {
            self.publish_to(ring, writer, latency);
        }
    }

    #[inline]
    fn publish_to(&self, ring: &Ring, writer: &mut Writer, latency: u64) {
        if writer.stage != Stage::Ended {
            writer.end_early();
        }
        // Before the number is taken: a reader that sees the number counted sees this, too.
        ring.arriving.store(writer.next, Ordering::Release);
        let sequence = self.sequence.0.fetch_add(1, Ordering::AcqRel);
        writer.next = sequence + 1;
        ring.put(writer, sequence, latency);
        ring.arriving.store(NONE_ARRIVING, Ordering::Release);
        writer.stage = Stage::Nothing;
    }

    /// Adds an event of the other rings.
    fn publish_aside(
        &self,
        to: &SideRing,
        vcpu: u32,
        (asked, latency): (&Asked, u64),
        write: impl FnOnce(&mut Writer),
    ) {
        let (writer, written) = &mut *to.writer.lock();
        if writer.chunk.is_none() {
            writer.chunk = to.ring.open_chunk();
        }
        writer.vcpu = vcpu;
        writer.begin(asked);
        write(writer);
        self.publish_to(&to.ring, writer, latency);
        *written += 1;
    }

    /// Adds an event that is no vCPU's request.
    pub(super) fn publish_other(&self, vcpu: u32, asked: (&Asked, u64), write: impl FnOnce(&mut Writer)) {
        self.publish_aside(&self.others, vcpu, asked, write);
    }

    /// Adds the event of a vCPU's request that reached no policy.
    pub(crate) fn malformed(&self, vcpu: u32, asked: &Asked, errno: Errno) {
        self.publish_aside(&self.malformed, vcpu, (asked, 0), |writer| {
            writer.decided(&RecordedDecision::none(asked.to));
            writer.ended(Outcome::Refused, errno.0, &Done::nothing(asked.gpa, asked.to));
        });
    }

    /// How many malformed requests there were, kept or dropped.
    pub(crate) fn malformed_total(&self) -> u64 {
        self.malformed.writer.lock().1
    }

    /// How many malformed requests came before the event with this number.
    pub(crate) fn malformed_before(&self, sequence: u64) -> u64 {
        let (_, written) = &*self.malformed.writer.lock();
        let parts = self.malformed.ring.parts();
        written
            - parts
                .iter()
                .map(|part| (part.to - part.find(sequence)) as u64)
                .sum::<u64>()
    }

    /// How many malformed requests were dropped to keep newer ones.
    pub(crate) fn malformed_dropped(&self) -> u64 {
        self.malformed_before(0)
    }

    /// How many events there were, kept or dropped.
    pub fn total(&self) -> u64 {
        self.sequence.0.load(Ordering::Relaxed)
    }

    /// How many events are kept.
    pub fn kept(&self) -> usize {
        self.parts().map(|part| part.to - part.from).sum()
    }

    /// The events that are kept, from sequence `since` on, in order. Those after one that is still being published are
    /// left out, so that a reader that goes on after the last one misses none.
    pub fn since(&self, since: u64) -> Vec<Event> {
        let mut events: Vec<Event> = Vec::new();
        for part in self.parts_since(since) {
            events.extend((part.from..part.to).filter_map(|row| part.chunk.event(row)));
        }
        events.sort_unstable_by_key(|event| event.sequence);
        events
    }

    /// The same as Arrow batches, in order. With one vCPU they use the log's memory in place; those of several are
    /// merged into one, which is a copy.
    pub fn batches_since(&self, since: u64) -> Vec<RecordBatch> {
        let parts = self.parts_since(since);
        let batches = parts.iter().map(|part| part.chunk.batch(part.from, part.to)).collect();
        match self.rings.len() {
            1 if [&self.others, &self.malformed].iter().all(|side| side.is_empty()) => batches,
            _ => table::merge(&batches).into_iter().collect(),
        }
    }

    fn parts_since(&self, since: u64) -> Vec<Part> {
        // Before the rows are read: every event with a lower number is published by then.
        let horizon = self.horizon();
        let cut = |part: Part| Part {
            from: part.find(since),
            to: part.find(horizon),
            ..part
        };
        self.parts().map(cut).filter(|part| part.from < part.to).collect()
    }

    /// All events with a lower number are published.
    fn horizon(&self) -> u64 {
        let total = self.sequence.0.load(Ordering::Acquire);
        let arriving = self.all_rings().map(|ring| ring.arriving.load(Ordering::Acquire));
        arriving.min().unwrap_or(total).min(total)
    }

    /// The events that are kept, as Arrow batches that use the log's memory in place. Each batch has events of one
    /// vCPU, of devices, or malformed requests, in order, and the batches are ordered by their first event.
    pub fn batches(&self) -> Vec<RecordBatch> {
        let mut parts: Vec<Part> = self.parts().filter(|part| part.from < part.to).collect();
        parts.sort_by_key(|part| part.chunk.sequence(part.from));
        parts.iter().map(|part| part.chunk.batch(part.from, part.to)).collect()
    }

    fn parts(&self) -> impl Iterator<Item = Part> {
        self.all_rings().flat_map(Ring::parts)
    }

    fn all_rings(&self) -> impl Iterator<Item = &Ring> {
        self.rings.iter().chain([&self.others.ring, &self.malformed.ring])
    }

    /// The last `n` events whose request was for the page at `gpa`, among others.
    pub(crate) fn about(&self, gpa: u64, n: usize) -> Vec<Event> {
        let mut events = self.since(0);
        events.retain(|event| event.gpa <= gpa && gpa - event.gpa < event.size);
        events.split_off(events.len().saturating_sub(n))
    }
}

impl Writer {
    /// Whether there is an event that is not published.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.stage != Stage::Nothing
    }

    #[inline]
    fn draft(&self) -> Option<Draft<'_>> {
        self.chunk.as_ref().map(|chunk| chunk.row(self.row))
    }

    /// Drops the present event, if any: one that an earlier run left incomplete, or one of a request that is judged
    /// again and gets a new event.
    pub(crate) fn forget(&mut self) {
        self.stage = Stage::Nothing;
    }

    /// Starts the event of a request.
    #[inline]
    pub(crate) fn begin(&mut self, asked: &Asked) {
        if let Some(mut row) = self.draft() {
            row.asked(self.vcpu, asked);
        }
        self.stage = Stage::Asked;
    }

    /// Notes which device it was.
    pub(super) fn by_device(&mut self, by: &ByDevice) {
        if let Some(mut row) = self.draft() {
            row.by_device(by);
        }
    }

    /// Notes the policy's decision.
    #[inline]
    pub(crate) fn decided(&mut self, decision: &RecordedDecision) {
        debug_assert!(self.is_open(), "there is no request");
        if let Some(mut row) = self.draft() {
            row.decided(decision);
        }
        self.stage = Stage::Decided;
    }

    /// Notes how the request ended.
    #[inline]
    pub(crate) fn ended(&mut self, outcome: Outcome, errno: i32, done: &Done) {
        debug_assert!(self.is_open(), "there is no request");
        if let Some(mut row) = self.draft() {
            row.ended(outcome, errno, done);
        }
        self.stage = Stage::Ended;
    }

    /// Notes how the request ended, where nothing was converted.
    pub(crate) fn ended_with_nothing(&mut self, outcome: Outcome, errno: i32) {
        if let Some((gpa, to)) = self.draft().map(|row| row.asked_for()) {
            self.ended(outcome, errno, &Done::nothing(gpa, to));
        }
        self.stage = Stage::Ended;
    }

    /// Notes a refusal by the conversion itself: it would have exceeded the decision's `max_shared`.
    pub(crate) fn refused(&mut self, errno: Errno) {
        if let Some((_, to)) = self.draft().map(|row| row.asked_for()) {
            self.decided(&RecordedDecision::deny(to, errno));
        }
        self.ended_with_nothing(Outcome::Denied, errno.0);
    }

    /// Fills in the rest of an event whose request failed before it was decided or ended.
    #[cold]
    fn end_early(&mut self) {
        if self.stage == Stage::Asked
            && let Some((_, to)) = self.draft().map(|row| row.asked_for())
        {
            self.decided(&RecordedDecision::none(to));
        }
        self.ended_with_nothing(Outcome::Failed, 0);
    }
}

impl Part {
    /// The first row with this sequence number or a higher one.
    fn find(&self, sequence: u64) -> usize {
        let (mut from, mut to) = (self.from, self.to);
        while from < to {
            let middle = from.midpoint(to);
            match self.chunk.sequence(middle) < sequence {
                true => from = middle + 1,
                false => to = middle,
            }
        }
        from
    }
}

impl SideRing {
    fn new(capacity: usize) -> Self {
        let writer = Writer {
            vcpu: NO_VCPU,
            next: 0,
            chunk: None,
            row: 0,
            stage: Stage::Nothing,
        };
        Self {
            ring: Ring::new(capacity),
            writer: Mutex::new((writer, 0)),
        }
    }

    fn is_empty(&self) -> bool {
        self.ring.chunks.lock().is_empty()
    }
}

impl Ring {
    fn new(capacity: usize) -> Self {
        Self {
            chunks: Mutex::default(),
            arriving: AtomicU64::new(NONE_ARRIVING),
            capacity,
        }
    }

    /// Writes the rest of the row and publishes it.
    #[inline]
    fn put(&self, writer: &mut Writer, sequence: u64, latency: u64) {
        let Some(chunk) = &writer.chunk else {
            if self.capacity > 0 {
                self.next_chunk(writer);
            }
            return;
        };
        chunk.row(writer.row).numbered(sequence, latency);
        writer.row += 1;
        chunk.publish(writer.row);
        if writer.row == ROWS {
            self.next_chunk(writer);
        }
    }

    /// Goes on with another chunk, if there is one.
    #[cold]
    fn next_chunk(&self, writer: &mut Writer) {
        writer.chunk = None; // so that it can be reused
        writer.chunk = self.open_chunk();
        writer.row = 0;
    }

    /// Adds a chunk. Reuses the oldest one, if the others hold enough events and nothing refers to it, and also if there is
    /// no memory for another: then the log keeps fewer events. `None` if that does not help, or none are kept.
    fn open_chunk(&self) -> Option<Arc<Chunk>> {
        if self.capacity == 0 {
            return None;
        }
        let mut chunks = self.chunks.lock();
        let held: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        let oldest = chunks.front().map_or(0, |chunk| chunk.len());
        let mut spare = None;
        if held - oldest >= self.capacity {
            spare = chunks.pop_front().and_then(emptied);
        }
        let made = spare.or_else(|| Chunk::new().map(Arc::new));
        let chunk = made.or_else(|| chunks.pop_front().and_then(emptied))?;
        chunks.push_back(chunk.clone());
        Some(chunk)
    }

    /// The last `capacity` published rows.
    fn parts(&self) -> Vec<Part> {
        let chunks: Vec<Arc<Chunk>> = self.chunks.lock().iter().cloned().collect();
        let mut parts: Vec<Part> = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let to = chunk.len();
            parts.push(Part { chunk, from: 0, to });
        }
        let mut surplus = parts
            .iter()
            .map(|part| part.to)
            .sum::<usize>()
            .saturating_sub(self.capacity);
        for part in &mut parts {
            part.from = surplus.min(part.to);
            surplus -= part.from;
        }
        parts
    }
}

/// The chunk without its rows, if nothing else refers to it.
fn emptied(mut chunk: Arc<Chunk>) -> Option<Arc<Chunk>> {
    Arc::get_mut(&mut chunk)?.clear();
    Some(chunk)
}

#[cfg(test)]
mod tests;
