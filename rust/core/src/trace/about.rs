//! The machine that a trace is from, kept in the metadata of the trace's schema.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_schema::{Schema, SchemaRef};

use crate::events::log::EventLog;
use crate::events::table;
use crate::memory::address::{PAGE_SIZE, Range, State};
use crate::memory::guest_memory::GuestMemory;
use crate::policy::trial::{MAX_MEMORY, Model};

/// The most ranges that the metadata lists.
const MAX_RANGES: usize = 4096;

const MEMORY: &str = "pagegate.memory";
const INITIAL: &str = "pagegate.initial";
const OTHERS: &str = "pagegate.others";
const FIRST: &str = "pagegate.first";
const DEBUG_PRIVATE: &str = "pagegate.debug_private";

/// A machine's memory, with the states of its pages when the trace begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    memory: u64,
    initial: State,
    /// The pages that are in the other state: ascending, no page twice.
    others: Vec<Range>,
    /// The sequence number of the first event, if none is missing.
    first: u64,
    debug_private: bool,
}

impl About {
    /// All of memory in one state. `None` unless `memory` is a positive multiple of 4096, at most 16 TiB.
    pub fn new(memory: u64, initial: State) -> Option<Self> {
        let valid = memory > 0 && memory.is_multiple_of(PAGE_SIZE) && memory <= MAX_MEMORY;
        valid.then(|| Self::whole(memory, initial))
    }

    /// The same, without the check.
    pub(super) fn whole(memory: u64, initial: State) -> Self {
        Self {
            memory,
            initial,
            others: Vec::new(),
            first: 0,
            debug_private: false,
        }
    }

    /// A machine as it is now. With more ranges in the other state than the metadata can list, none is listed.
    pub fn now(events: &EventLog, memory: &GuestMemory, debug_private: bool) -> Self {
        let first = events.total();
        let map = memory.snapshot();
        let initial = match map.private_bytes() > map.size() / 2 {
            true => State::Private,
            false => State::Shared,
        };
        // The hole counts as private: it is no memory that is shared.
        let hole = memory.views().hole().filter(|_| initial == State::Shared);
        let ram = memory.views().ram().into_iter();
        let runs = ram.flat_map(|ram| map.runs_in(ram)).filter(|run| run.state != initial);
        let others = runs.map(|run| run.range).chain(hole);
        let mut others: Vec<Range> = others.take(MAX_RANGES + 1).collect();
        others.sort_by_key(Range::gpa);
        Self {
            memory: map.size(),
            initial,
            others: if others.len() > MAX_RANGES { Vec::new() } else { others },
            first,
            debug_private,
        }
    }

    /// Bytes of guest memory.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// The state of most pages.
    pub fn initial(&self) -> State {
        self.initial
    }

    /// The sequence number of the first event, if none is missing.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Whether the host could read and write private pages.
    pub fn debug_private(&self) -> bool {
        self.debug_private
    }

    /// Bytes that are shared when the trace begins.
    pub fn shared_bytes(&self) -> u64 {
        let others: u64 = self.others.iter().map(Range::size).sum();
        match self.initial {
            State::Shared => self.memory - others,
            State::Private => others,
        }
    }

    /// The states of all pages when the trace begins.
    pub(super) fn model(&self) -> Model {
        let mut model = Model::new(self.memory, self.initial);
        for range in &self.others {
            model.set(*range, self.initial.other());
        }
        model
    }

    /// The schema of events, with this in its metadata.
    pub fn schema(&self) -> SchemaRef {
        let others: Vec<String> = self
            .others
            .iter()
            .map(|range| format!("{:#x}+{:#x}", range.gpa(), range.size()))
            .collect();
        let metadata = [
            (MEMORY, self.memory.to_string()),
            (INITIAL, self.initial.as_str().to_owned()),
            (OTHERS, others.join(" ")),
            (FIRST, self.first.to_string()),
            (DEBUG_PRIVATE, self.debug_private.to_string()),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
        let fields = table::schema().fields().clone();
        Arc::new(Schema::new_with_metadata(fields, HashMap::from(metadata)))
    }

    /// Reads it from a schema's metadata. `None` where it is not there: some tools drop metadata when they write a
    /// table.
    ///
    /// # Errors
    /// A sentence that names the value that is not valid.
    pub fn of(schema: &Schema) -> Result<Option<Self>, String> {
        let value = |key| schema.metadata().get(key).map(String::as_str);
        let (Some(memory), Some(initial)) = (value(MEMORY), value(INITIAL)) else {
            return Ok(None);
        };
        let wrong = |key: &str| format!("the metadata's {key} is not valid");
        let states = [State::Shared, State::Private];
        let initial = states.into_iter().find(|state| state.as_str() == initial);
        let about = memory.parse().ok().zip(initial);
        let mut about = about
            .and_then(|(memory, initial)| Self::new(memory, initial))
            .ok_or_else(|| wrong(MEMORY))?;
        about.first = value(FIRST).map_or(Ok(0), str::parse).map_err(|_| wrong(FIRST))?;
        // Traces of earlier versions do not say.
        let debug_private = value(DEBUG_PRIVATE).map_or(Ok(false), str::parse);
        about.debug_private = debug_private.map_err(|_| wrong(DEBUG_PRIVATE))?;
        for range in value(OTHERS).unwrap_or_default().split_whitespace() {
            let range = parse(range).filter(|range| range.end() <= about.memory && about.others.len() < MAX_RANGES);
            about.others.push(range.ok_or_else(|| wrong(OTHERS))?);
        }
        about.others.sort_by_key(Range::gpa);
        if about.others.windows(2).any(|pair| pair[0].overlaps(&pair[1])) {
            return Err(wrong(OTHERS));
        }
        Ok(Some(about))
    }
}

fn parse(range: &str) -> Option<Range> {
    let number = |text: &str| u64::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    let (gpa, size) = range.split_once('+')?;
    Range::new(number(gpa)?, number(size)?)
}
