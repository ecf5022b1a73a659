//! Events as columns: what they are called in an Arrow table, and of which type each is.

use std::sync::{Arc, LazyLock};

use arrow_schema::{DataType, Field, Schema, SchemaRef};

use super::{Answer, Event, Kind, Outcome, Verdict};
use crate::attributes::State;

pub(super) const WORDS: usize = 11;
pub(super) const HALVES: usize = 7;
pub(super) const BYTES: usize = 9;

/// An event as its columns hold it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Row {
    pub words: [u64; WORDS],
    pub halves: [u32; HALVES],
    pub bytes: [u8; BYTES],
}

/// Where in a [`Row`] a column's values are, and what they mean.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    Word(usize),
    Half(usize),
    Signed(usize),
    /// 0 or 1.
    Flag(usize),
    /// The number of one of these.
    Code(usize, Vocabulary),
}

/// A column of words has numbers in place of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vocabulary {
    Kinds,
    States,
    Verdicts,
    Outcomes,
}

const MIXED: u8 = 2;

impl Vocabulary {
    pub(super) const ALL: [Vocabulary; 4] = [
        Vocabulary::Kinds,
        Vocabulary::States,
        Vocabulary::Verdicts,
        Vocabulary::Outcomes,
    ];

    /// The words, each at its number.
    pub(super) fn words(self) -> Vec<&'static str> {
        match self {
            Vocabulary::Kinds => Kind::ALL.map(Kind::as_str).to_vec(),
            Vocabulary::States => vec![State::Shared.as_str(), State::Private.as_str(), "mixed"],
            Vocabulary::Verdicts => Verdict::ALL.map(Verdict::as_str).to_vec(),
            Vocabulary::Outcomes => Outcome::ALL.map(Outcome::as_str).to_vec(),
        }
    }
}

/// The columns, in order.
pub(super) static COLUMNS: [(&str, Source); WORDS + HALVES + BYTES] = [
    ("sequence", Source::Word(0)),
    ("time", Source::Word(1)),
    ("vcpu", Source::Half(0)),
    ("kind", Source::Code(0, Vocabulary::Kinds)),
    ("gpa", Source::Word(2)),
    ("size", Source::Word(3)),
    ("to", Source::Code(1, Vocabulary::States)),
    ("state", Source::Code(2, Vocabulary::States)),
    ("page_size", Source::Half(1)),
    ("raw", Source::Half(2)),
    ("flags", Source::Half(3)),
    ("rip", Source::Word(4)),
    ("repeats", Source::Half(4)),
    ("decision", Source::Code(3, Vocabulary::Verdicts)),
    ("decision_gpa", Source::Word(5)),
    ("decision_size", Source::Word(6)),
    ("decision_to", Source::Code(4, Vocabulary::States)),
    ("decision_prefault", Source::Flag(5)),
    ("decision_discard", Source::Flag(6)),
    ("decision_errno", Source::Signed(5)),
    ("outcome", Source::Code(7, Vocabulary::Outcomes)),
    ("done_gpa", Source::Word(7)),
    ("done_size", Source::Word(8)),
    ("done_to", Source::Code(8, Vocabulary::States)),
    ("changed", Source::Word(9)),
    ("errno", Source::Signed(6)),
    ("latency", Source::Word(10)),
];

impl Source {
    pub(super) fn data_type(self) -> DataType {
        match self {
            Source::Word(_) => DataType::UInt64,
            Source::Half(_) => DataType::UInt32,
            Source::Signed(_) => DataType::Int32,
            Source::Flag(_) => DataType::UInt8,
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

impl From<&Event> for Row {
    #[inline]
    fn from(event: &Event) -> Self {
        let answer = &event.answer;
        Self {
            words: [
                event.sequence,
                event.time,
                event.gpa,
                event.size,
                event.rip,
                answer.gpa,
                answer.size,
                event.done_gpa,
                event.done_size,
                event.changed,
                event.latency,
            ],
            halves: [
                event.vcpu,
                event.page_size,
                event.raw,
                event.flags,
                event.repeats,
                answer.errno as u32,
                event.errno as u32,
            ],
            bytes: [
                event.kind as u8,
                event.to as u8,
                event.state.map_or(MIXED, |state| state as u8),
                answer.verdict as u8,
                answer.to as u8,
                answer.prefault.into(),
                answer.discard.into(),
                event.outcome as u8,
                event.done_to as u8,
            ],
        }
    }
}

impl Row {
    /// `None` where a number stands for nothing.
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
        let [vcpu, page_size, raw, flags, repeats, decision_errno, errno] = self.halves;
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
        ] = self.bytes;
        Some(Event {
            sequence,
            time,
            vcpu,
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
            answer: Answer {
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
