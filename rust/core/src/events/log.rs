//! The bounded log of requests.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::RecordBatch;
use parking_lot::Mutex;

use super::chunk::{Chunk, Draft, ROWS};
use super::columns::Cells;
use super::event::{Asked, Done, Event, Outcome, RecordedDecision};
use super::table;
use crate::errno::Errno;

/// The events of one vCPU. Alone in its cache lines, for it is written at every request.
#[repr(align(128))]
struct Ring {
    /// The last one is being written. Held for a moment, once in a chunk by the vCPU.
    chunks: Mutex<VecDeque<Arc<Chunk>>>,
    /// No event of this vCPU that is still on its way here has a lower number.
    arriving: AtomicU64,
}

const NONE_ARRIVING: u64 = u64::MAX;

/// The last events of each vCPU. A full ring drops its oldest.
pub struct EventLog {
    rings: Vec<Ring>,
    /// Events that a ring keeps.
    capacity: usize,
    sequence: Sequence,
}

/// The number of the next event, which all vCPUs take. Alone in its cache lines.
#[repr(align(128))]
#[derive(Default)]
struct Sequence(AtomicU64);

/// Writes the events of one vCPU, one after the other: each while its request is being answered, and then published.
pub(crate) struct Writer {
    vcpu: u32,
    /// Its next event has no lower number.
    next: u64,
    /// Where the present or the next event is written; `None` where no events are kept.
    chunk: Option<Arc<Chunk>>,
    /// Which row: the first that is not published.
    row: usize,
    stage: Stage,
}

/// What was written of the present event.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// There is none.
    Nothing,
    Asked,
    Decided,
    Ended,
}

/// Some of a chunk's rows.
struct Part {
    chunk: Arc<Chunk>,
    from: usize,
    to: usize,
}

impl EventLog {
    /// Room for `capacity` events in all, 0 for none; and for each vCPU what writes there.
    pub(crate) fn new(capacity: usize, vcpus: usize) -> (Self, Vec<Writer>) {
        let capacity = capacity.div_ceil(vcpus.max(1));
        let ring = |_| Ring {
            chunks: Mutex::default(),
            arriving: AtomicU64::new(NONE_ARRIVING),
        };
        let log = Self {
            rings: (0..vcpus).map(ring).collect(),
            capacity,
            sequence: Sequence::default(),
        };
        let writer = |vcpu| Writer {
            vcpu,
            next: 0,
            chunk: (capacity > 0).then(|| log.rings[vcpu as usize].open_chunk(capacity)),
            row: 0,
            stage: Stage::Nothing,
        };
        let writers = (0..vcpus as u32).map(writer).collect();
        (log, writers)
    }

    /// The request is over: its event is there to be read. Nobody who reads is waited for.
    #[inline]
    pub(crate) fn publish(&self, writer: &mut Writer, latency: u64) {
        if writer.stage != Stage::Ended {
            writer.end_early();
        }
        let ring = &self.rings[writer.vcpu as usize];
        // Whoever finds the number that is taken next counted finds this, too.
        ring.arriving.store(writer.next, Ordering::Release);
        let sequence = self.sequence.0.fetch_add(1, Ordering::AcqRel);
        writer.next = sequence + 1;
        self.put(writer, sequence, latency);
        ring.arriving.store(NONE_ARRIVING, Ordering::Release);
        writer.stage = Stage::Nothing;
    }

    #[inline]
    fn put(&self, writer: &mut Writer, sequence: u64, latency: u64) {
        let Some(chunk) = &writer.chunk else {
            return;
        };
        chunk.row(writer.row).numbered(sequence, latency);
        writer.row += 1;
        chunk.publish(writer.row);
        if writer.row == ROWS {
            self.turn(writer);
        }
    }

    #[cold]
    fn turn(&self, writer: &mut Writer) {
        writer.chunk = Some(self.rings[writer.vcpu as usize].open_chunk(self.capacity));
        writer.row = 0;
    }

    /// Events there were, kept or dropped.
    pub fn total(&self) -> u64 {
        self.sequence.0.load(Ordering::Relaxed)
    }

    /// Events that are kept.
    pub fn kept(&self) -> usize {
        self.parts().map(|part| part.to - part.from).sum()
    }

    /// The events that are kept, from sequence `since` on, in order. One that is not here yet hides those after it, so
    /// that whoever goes on after the last one misses none.
    pub fn since(&self, since: u64) -> Vec<Event> {
        let mut events: Vec<Event> = Vec::new();
        for part in self.parts_since(since) {
            events.extend((part.from..part.to).filter_map(|row| part.chunk.event(row)));
        }
        events.sort_unstable_by_key(|event| event.sequence);
        events
    }

    /// The same as columns, in order. Those of one vCPU lie in the log's own memory, those of several are merged.
    pub fn batches_since(&self, since: u64) -> Vec<RecordBatch> {
        let parts = self.parts_since(since);
        let batches = parts.iter().map(|part| part.chunk.batch(part.from, part.to)).collect();
        match self.rings.len() {
            1 => batches,
            _ => table::merge(&batches).into_iter().collect(),
        }
    }

    fn parts_since(&self, since: u64) -> Vec<Part> {
        // Whoever takes a number after this one finds its rows after those that are looked at.
        let horizon = self.horizon();
        let cut = |part: Part| Part {
            from: part.find(since),
            to: part.find(horizon),
            ..part
        };
        self.parts().map(cut).filter(|part| part.from < part.to).collect()
    }

    fn horizon(&self) -> u64 {
        let total = self.sequence.0.load(Ordering::Acquire);
        let arriving = self.rings.iter().map(|ring| ring.arriving.load(Ordering::Acquire));
        arriving.min().unwrap_or(total).min(total)
    }

    /// The events that are kept as Arrow batches over the log's own memory. Those of one vCPU are in order; those of
    /// several take turns, a batch each.
    pub fn batches(&self) -> Vec<RecordBatch> {
        let mut parts: Vec<Part> = self.parts().filter(|part| part.from < part.to).collect();
        parts.sort_by_key(|part| part.chunk.sequence(part.from));
        parts.iter().map(|part| part.chunk.batch(part.from, part.to)).collect()
    }

    fn parts(&self) -> impl Iterator<Item = Part> {
        self.rings.iter().flat_map(|ring| ring.parts(self.capacity))
    }

    /// The last `n` events that asked for the page at `gpa`.
    pub(crate) fn about(&self, gpa: u64, n: usize) -> Vec<Event> {
        let mut events = self.since(0);
        events.retain(|event| event.gpa <= gpa && gpa - event.gpa < event.size);
        events.split_off(events.len().saturating_sub(n))
    }
}

impl Writer {
    /// Whether there is a request that is not over.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.stage != Stage::Nothing
    }

    #[inline]
    fn draft(&self) -> Option<Draft<'_>> {
        self.chunk.as_ref().map(|chunk| chunk.row(self.row))
    }

    /// There is no request: that of an earlier run, which did not come to its end, is none of this one's, and one that is
    /// judged anew is written anew.
    pub(crate) fn forget(&mut self) {
        self.stage = Stage::Nothing;
    }

    /// A request came.
    #[inline]
    pub(crate) fn begin(&mut self, asked: &Asked) {
        if let Some(mut row) = self.draft() {
            row.asked(self.vcpu, asked);
        }
        self.stage = Stage::Asked;
    }

    /// What the policy answered.
    #[inline]
    pub(crate) fn decided(&mut self, decision: &RecordedDecision) {
        debug_assert!(self.is_open(), "there is no request that this could be an answer to");
        if let Some(mut row) = self.draft() {
            row.decided(decision);
        }
        self.stage = Stage::Decided;
    }

    /// What came of it.
    #[inline]
    pub(crate) fn ended(&mut self, outcome: Outcome, errno: i32, done: &Done) {
        debug_assert!(self.is_open(), "there is no request of which this could come");
        if let Some(mut row) = self.draft() {
            row.ended(outcome, errno, done);
        }
        self.stage = Stage::Ended;
    }

    /// What came of it, where nothing was converted.
    pub(crate) fn ended_with_nothing(&mut self, outcome: Outcome, errno: i32) {
        if let Some((gpa, to)) = self.draft().map(|row| row.wanted()) {
            self.ended(outcome, errno, &Done::nothing(gpa, to));
        }
        self.stage = Stage::Ended;
    }

    /// What the gate refused because of the policy's own condition.
    pub(crate) fn refused(&mut self, errno: Errno) {
        if let Some((_, to)) = self.draft().map(|row| row.wanted()) {
            self.decided(&RecordedDecision::deny(to, errno));
        }
        self.ended_with_nothing(Outcome::Denied, errno.0);
    }

    /// Something failed before that.
    #[cold]
    fn end_early(&mut self) {
        if self.stage == Stage::Asked
            && let Some((_, to)) = self.draft().map(|row| row.wanted())
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

impl Ring {
    /// Another chunk, made of the oldest if the others hold enough and nobody has it.
    fn open_chunk(&self, capacity: usize) -> Arc<Chunk> {
        let mut chunks = self.chunks.lock();
        let held: usize = chunks.iter().map(|chunk| chunk.len()).sum();
        let oldest = chunks.front().map_or(0, |chunk| chunk.len());
        let surplus = held - oldest >= capacity;
        let mut spare = surplus.then(|| chunks.pop_front()).flatten();
        let chunk = match spare.as_mut().and_then(Arc::get_mut) {
            Some(only) => {
                only.clear();
                spare
            }
            None => None,
        };
        let chunk = chunk.unwrap_or_else(|| Arc::new(Chunk::new()));
        chunks.push_back(chunk.clone());
        chunk
    }

    /// What of the chunks is kept: the last `capacity` rows.
    fn parts(&self, capacity: usize) -> Vec<Part> {
        let chunks: Vec<Arc<Chunk>> = self.chunks.lock().iter().cloned().collect();
        let mut parts: Vec<Part> = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            let to = chunk.len();
            parts.push(Part { chunk, from: 0, to });
        }
        let mut surplus = parts.iter().map(|part| part.to).sum::<usize>().saturating_sub(capacity);
        for part in &mut parts {
            part.from = surplus.min(part.to);
            surplus -= part.from;
        }
        parts
    }
}
