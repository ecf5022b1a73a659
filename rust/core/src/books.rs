//! The map of a part of memory and what is remembered of its changes, page by page: together under one short lock.

use crate::attributes::{AttributeMap, PAGE_SIZE, Range, State};

/// How many changes are remembered exactly. More than a vCPU misses while it is in the guest, as a rule; behind them
/// the map's own stamps speak for whole 2 MiB blocks.
const REMEMBERED: usize = 64;

pub(crate) struct Books {
    map: AttributeMap,
    /// The last changes, each at its generation's place in turn.
    recent: Box<[Range; REMEMBERED]>,
    watches: Vec<Watch>,
    /// Whether anybody watches.
    watched: bool,
}

/// The page that a vCPU last faulted on.
#[derive(Clone, Copy, Default)]
struct Watch {
    gpa: u64,
    changes: u64,
}

impl Books {
    pub(crate) fn new(map: AttributeMap, vcpus: usize) -> Self {
        #[expect(clippy::expect_used, reason = "a constant range")]
        let page = Range::new(0, PAGE_SIZE).expect("a page");
        Self {
            map,
            recent: Box::new([page; REMEMBERED]),
            watches: vec![Watch::default(); vcpus],
            watched: false,
        }
    }

    pub(crate) fn map(&self) -> &AttributeMap {
        &self.map
    }

    /// Takes a change over: bytes whose state it changed.
    #[inline(always)]
    pub(crate) fn set(&mut self, range: Range, to: State) -> u64 {
        if self.watched {
            self.tell_watches(range, to);
        }
        let changed = self.map.set(range, to);
        if changed > 0 {
            self.recent[self.map.generation() as usize % REMEMBERED] = range;
        }
        changed
    }

    /// Takes note of a change that was undone.
    pub(crate) fn disturb(&mut self, range: Range) {
        self.map.disturb(range);
        self.recent[self.map.generation() as usize % REMEMBERED] = range;
    }

    #[inline(never)]
    fn tell_watches(&mut self, range: Range, to: State) {
        for watch in &mut self.watches {
            let changes = range.contains(watch.gpa) && self.map.state(watch.gpa) != to;
            watch.changes += u64::from(changes);
        }
    }

    /// Whether the page at `gpa` changed after `generation`. Exact as far as is remembered, else cautious.
    pub(crate) fn changed_since(&self, gpa: u64, generation: u64) -> bool {
        if !self.map.changed_since(gpa, generation) {
            return false;
        }
        let now = self.map.generation();
        let missed = now - generation > REMEMBERED as u64;
        let mut later = (generation + 1..=now).map(|when| self.recent[when as usize % REMEMBERED]);
        missed || later.any(|range| range.contains(gpa))
    }

    /// How often the page at `gpa` changed since this vCPU began to watch it, which may be now.
    pub(crate) fn watch(&mut self, vcpu: u32, gpa: u64) -> u64 {
        let Some(watch) = self.watches.get_mut(vcpu as usize) else {
            return 0;
        };
        if watch.gpa != gpa {
            *watch = Watch { gpa, changes: 0 };
        }
        self.watched = true;
        watch.changes
    }
}
