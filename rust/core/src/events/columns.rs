//! The columns of events: their names and types in an Arrow table, and the mapping from and to [`Event`].

use std::sync::{Arc, LazyLock};

use arrow_schema::{DataType, Field, Schema, SchemaRef, TimeUnit};

use super::event::{Asked, ByDevice, Done, Event, Kind, Outcome, RecordedDecision, Verdict};
use crate::memory::address::State;

/// Indices of the 64-bit columns (words).
pub(super) mod word {
    pub const SEQUENCE: usize = 0;
    pub const TIME: usize = 1;
    pub const GPA: usize = 2;
    pub const SIZE: usize = 3;
    pub const RIP: usize = 4;
    pub const DECISION_GPA: usize = 5;
    pub const DECISION_SIZE: usize = 6;
    pub const DONE_GPA: usize = 7;
    pub const DONE_SIZE: usize = 8;
    pub const CHANGED: usize = 9;
    pub const LATENCY: usize = 10;
}

/// Indices of the 32-bit columns (halves).
pub(super) mod half {
    pub const VCPU: usize = 0;
    pub const PAGE_SIZE: usize = 1;
    pub const RAW: usize = 2;
    pub const FLAGS: usize = 3;
    pub const REPEATS: usize = 4;
    pub const DECISION_ERRNO: usize = 5;
    pub const ERRNO: usize = 6;
    pub const DEVICE: usize = 7;
    pub const QUEUE: usize = 8;
    pub const DESCRIPTOR: usize = 9;
}

/// Indices of the 8-bit columns (bytes).
pub(super) mod byte {
    pub const KIND: usize = 0;
    pub const TO: usize = 1;
    pub const STATE: usize = 2;
    pub const DECISION: usize = 3;
    pub const DECISION_TO: usize = 4;
    pub const PREFAULT: usize = 5;
    pub const DISCARD: usize = 6;
    pub const OUTCOME: usize = 7;
    pub const DONE_TO: usize = 8;
    pub const WRITE: usize = 9;
}

pub(super) const WORDS: usize = word::LATENCY + 1;
pub(super) const HALVES: usize = half::DESCRIPTOR + 1;
pub(super) const BYTES: usize = byte::WRITE + 1;

/// One event's value in each column.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Row {
    pub words: [u64; WORDS],
    pub halves: [u32; HALVES],
    pub bytes: [u8; BYTES],
}

/// Where in a [`Row`] the values of a table's column are, and what they are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Word(usize),
    /// A word that holds nanoseconds.
    Nanoseconds(usize),
    Half(usize),
    /// A half that holds an i32.
    Signed(usize),
    /// 0 or 1.
    Flag(usize),
    /// A byte that stands for one of these names.
    Code(usize, Vocabulary),
}

/// A set of names that a column holds as numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vocabulary {
    Kinds,
    States,
    Verdicts,
    Outcomes,
}

/// In column `descriptor`: none.
const NO_DESCRIPTOR: u32 = u32::MAX;
/// In column `state`, the number of a mixed one.
const MIXED: u8 = 2;

impl Vocabulary {
    pub(super) const ALL: [Vocabulary; 4] = [
        Vocabulary::Kinds,
        Vocabulary::States,
        Vocabulary::Verdicts,
        Vocabulary::Outcomes,
    ];

    /// The names, each at the index that is its number.
    pub(super) fn names(self) -> Vec<&'static str> {
        match self {
            Vocabulary::Kinds => Kind::ALL.map(Kind::as_str).to_vec(),
            Vocabulary::States => vec![State::Shared.as_str(), State::Private.as_str(), "mixed"],
            Vocabulary::Verdicts => Verdict::ALL.map(Verdict::as_str).to_vec(),
            Vocabulary::Outcomes => Outcome::ALL.map(Outcome::as_str).to_vec(),
        }
    }
}

/// The columns of a table, in order.
pub(super) static COLUMNS: [(&str, Source); WORDS + HALVES + BYTES] = [
    ("sequence", Source::Word(word::SEQUENCE)),
    ("time", Source::Word(word::TIME)),
    ("vcpu", Source::Half(half::VCPU)),
    ("kind", Source::Code(byte::KIND, Vocabulary::Kinds)),
    ("gpa", Source::Word(word::GPA)),
    ("size", Source::Word(word::SIZE)),
    ("to", Source::Code(byte::TO, Vocabulary::States)),
    ("state", Source::Code(byte::STATE, Vocabulary::States)),
    ("page_size", Source::Half(half::PAGE_SIZE)),
    ("raw", Source::Half(half::RAW)),
    ("flags", Source::Half(half::FLAGS)),
    ("rip", Source::Word(word::RIP)),
    ("repeats", Source::Half(half::REPEATS)),
    ("decision", Source::Code(byte::DECISION, Vocabulary::Verdicts)),
    ("decision_gpa", Source::Word(word::DECISION_GPA)),
    ("decision_size", Source::Word(word::DECISION_SIZE)),
    ("decision_to", Source::Code(byte::DECISION_TO, Vocabulary::States)),
    ("decision_prefault", Source::Flag(byte::PREFAULT)),
    ("decision_discard", Source::Flag(byte::DISCARD)),
    ("decision_errno", Source::Signed(half::DECISION_ERRNO)),
    ("outcome", Source::Code(byte::OUTCOME, Vocabulary::Outcomes)),
    ("done_gpa", Source::Word(word::DONE_GPA)),
    ("done_size", Source::Word(word::DONE_SIZE)),
    ("done_to", Source::Code(byte::DONE_TO, Vocabulary::States)),
    ("changed", Source::Word(word::CHANGED)),
    ("errno", Source::Signed(half::ERRNO)),
    ("latency", Source::Nanoseconds(word::LATENCY)),
    ("device", Source::Half(half::DEVICE)),
    ("queue", Source::Half(half::QUEUE)),
    ("descriptor", Source::Half(half::DESCRIPTOR)),
    ("write", Source::Flag(byte::WRITE)),
];

/// The last columns are of devices. A table of a machine without any may lack them.
pub(super) const OF_DEVICES: usize = 4;

impl Source {
    pub(super) fn data_type(self) -> DataType {
        match self {
            Source::Word(_) => DataType::UInt64,
            Source::Nanoseconds(_) => DataType::Duration(TimeUnit::Nanosecond),
            Source::Half(_) => DataType::UInt32,
            Source::Signed(_) => DataType::Int32,
            Source::Flag(_) => DataType::Boolean,
            Source::Code(..) => DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8)),
        }
    }
}

/// The schema of a table of events.
pub fn schema() -> SchemaRef {
    static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
        let field = |(name, source): &(&str, Source)| Field::new(*name, source.data_type(), false);
        Arc::new(Schema::new(COLUMNS.iter().map(field).collect::<Vec<_>>()))
    });
    SCHEMA.clone()
}

/// A row to write to: each part of an event when it becomes known.
pub(super) trait Cells {
    fn put_word(&mut self, column: usize, value: u64);
    fn put_half(&mut self, column: usize, value: u32);
    fn put_byte(&mut self, column: usize, value: u8);

    #[inline]
    fn asked(&mut self, vcpu: u32, asked: &Asked) {
        self.put_word(word::TIME, asked.time);
        self.put_half(half::VCPU, vcpu);
        self.put_byte(byte::KIND, asked.kind as u8);
        self.put_word(word::GPA, asked.gpa);
        self.put_word(word::SIZE, asked.size);
        self.put_byte(byte::TO, asked.to as u8);
        self.put_byte(byte::STATE, asked.state.map_or(MIXED, |state| state as u8));
        self.put_half(half::PAGE_SIZE, asked.page_size);
        self.put_half(half::RAW, asked.raw);
        self.put_half(half::FLAGS, asked.flags);
        self.put_word(word::RIP, asked.rip);
        self.put_half(half::REPEATS, asked.repeats);
    }

    /// The columns of a device's access. Those of other rows are zeroes, and are not written.
    fn by_device(&mut self, by: &ByDevice) {
        self.put_half(half::DEVICE, by.number);
        self.put_half(half::QUEUE, by.queue.into());
        self.put_half(half::DESCRIPTOR, by.descriptor.map_or(NO_DESCRIPTOR, u32::from));
        self.put_byte(byte::WRITE, by.write.into());
    }

    #[inline]
    fn decided(&mut self, decision: &RecordedDecision) {
        self.put_byte(byte::DECISION, decision.verdict as u8);
        self.put_word(word::DECISION_GPA, decision.gpa);
        self.put_word(word::DECISION_SIZE, decision.size);
        self.put_byte(byte::DECISION_TO, decision.to as u8);
        self.put_byte(byte::PREFAULT, decision.prefault.into());
        self.put_byte(byte::DISCARD, decision.discard.into());
        self.put_half(half::DECISION_ERRNO, decision.errno as u32);
    }

    #[inline]
    fn ended(&mut self, outcome: Outcome, errno: i32, done: &Done) {
        self.put_byte(byte::OUTCOME, outcome as u8);
        self.put_half(half::ERRNO, errno as u32);
        self.put_word(word::DONE_GPA, done.gpa);
        self.put_word(word::DONE_SIZE, done.size);
        self.put_byte(byte::DONE_TO, done.to as u8);
        self.put_word(word::CHANGED, done.changed);
    }

    #[inline]
    fn numbered(&mut self, sequence: u64, latency: u64) {
        self.put_word(word::SEQUENCE, sequence);
        self.put_word(word::LATENCY, latency);
    }
}

impl Cells for Row {
    fn put_word(&mut self, column: usize, value: u64) {
        self.words[column] = value;
    }

    fn put_half(&mut self, column: usize, value: u32) {
        self.halves[column] = value;
    }

    fn put_byte(&mut self, column: usize, value: u8) {
        self.bytes[column] = value;
    }
}

impl From<&Event> for Row {
    fn from(event: &Event) -> Self {
        let mut row = Self::default();
        row.asked(
            event.vcpu,
            &Asked {
                time: event.time,
                kind: event.kind,
                gpa: event.gpa,
                size: event.size,
                to: event.to,
                state: event.state,
                page_size: event.page_size,
                raw: event.raw,
                flags: event.flags,
                rip: event.rip,
                repeats: event.repeats,
            },
        );
        if let Some(by) = &event.device {
            row.by_device(by);
        }
        row.decided(&event.decision);
        let done = Done {
            gpa: event.done_gpa,
            size: event.done_size,
            to: event.done_to,
            changed: event.changed,
        };
        row.ended(event.outcome, event.errno, &done);
        row.numbered(event.sequence, event.latency);
        row
    }
}

impl Row {
    /// The event; `None` if a byte does not stand for a name of its column.
    pub(super) fn event(&self) -> Option<Event> {
        let [
            sequence,
            time,
            gpa,
            size,
            rip,
            decision_gpa,
            decision_size,
            done_gpa,
            done_size,
            changed,
            latency,
        ] = self.words;
        let [
            vcpu,
            page_size,
            raw,
            flags,
            repeats,
            decision_errno,
            errno,
            device,
            queue,
            descriptor,
        ] = self.halves;
        let [
            kind,
            to,
            state,
            verdict,
            decision_to,
            prefault,
            discard,
            outcome,
            done_to,
            write,
        ] = self.bytes;
        let device = match device {
            0 => None,
            number => Some(ByDevice {
                number,
                queue: u16::try_from(queue).ok()?,
                descriptor: match descriptor {
                    NO_DESCRIPTOR => None,
                    descriptor => Some(u16::try_from(descriptor).ok()?),
                },
                write: write != 0,
            }),
        };
        Some(Event {
            sequence,
            time,
            vcpu,
            device,
            kind: *Kind::ALL.get(usize::from(kind))?,
            gpa,
            size,
            to: state_of(to)?,
            state: if state == MIXED { None } else { Some(state_of(state)?) },
            page_size,
            raw,
            flags,
            rip,
            repeats,
            decision: RecordedDecision {
                verdict: *Verdict::ALL.get(usize::from(verdict))?,
                gpa: decision_gpa,
                size: decision_size,
                to: state_of(decision_to)?,
                prefault: prefault != 0,
                discard: discard != 0,
                errno: decision_errno as i32,
            },
            outcome: *Outcome::ALL.get(usize::from(outcome))?,
            done_gpa,
            done_size,
            done_to: state_of(done_to)?,
            changed,
            errno: errno as i32,
            latency,
        })
    }
}

fn state_of(code: u8) -> Option<State> {
    [State::Shared, State::Private].get(usize::from(code)).copied()
}
