//! The map of a part of memory and what is remembered of its changes, page by page: together under one short lock.

use std::collections::VecDeque;

use crate::attributes::{AttributeMap, Range, State};

/// How many changes are remembered exactly. More than a vCPU misses while it is in the guest, as a rule; behind them
/// the map's own stamps speak for whole 2 MiB blocks.
const REMEMBERED: usize = 64;

pub(crate) struct Books {
    map: AttributeMap,
    recent: VecDeque<(u64, Range)>,
    watches: Vec<Watch>,
}

/// The page that a vCPU last faulted on.
#[derive(Clone, Copy, Default)]
struct Watch {
    gpa: u64,
    changes: u64,
}

impl Books {
    pub(crate) fn new(map: AttributeMap, vcpus: usize) -> Self {
        Self {
            map,
            recent: VecDeque::with_capacity(REMEMBERED),
            watches: vec![Watch::default(); vcpus],
        }
    }

    pub(crate) fn map(&self) -> &AttributeMap {
        &self.map
    }

    /// Takes a change over: bytes whose state it changed.
    pub(crate) fn set(&mut self, range: Range, to: State) -> u64 {
        for watch in &mut self.watches {
            let changes = range.contains(watch.gpa) && self.map.state(watch.gpa) != to;
            watch.changes += u64::from(changes);
        }
        let changed = self.map.set(range, to);
        if changed > 0 {
            if self.recent.len() == REMEMBERED {
                self.recent.pop_front();
            }
            self.recent.push_back((self.map.generation(), range));
        }
        changed
    }

    /// Whether the page at `gpa` changed after `generation`. Exact as far as is remembered, else cautious.
    pub(crate) fn changed_since(&self, gpa: u64, generation: u64) -> bool {
        if !self.map.changed_since(gpa, generation) {
            return false;
        }
        let oldest = self.recent.front().map_or(0, |(oldest, _)| *oldest);
        let missed = oldest > generation + 1;
        let mut later = self.recent.iter().rev().take_while(|(when, _)| *when > generation);
        missed || later.any(|(_, range)| range.contains(gpa))
    }

    /// How often the page at `gpa` changed since this vCPU began to watch it, which may be now.
    pub(crate) fn watch(&mut self, vcpu: u32, gpa: u64) -> u64 {
        let Some(watch) = self.watches.get_mut(vcpu as usize) else {
            return 0;
        };
        if watch.gpa != gpa {
            *watch = Watch { gpa, changes: 0 };
        }
        watch.changes
    }
}
