//! The bounded log of requests: what was asked, decided and done.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::attributes::State;

/// How a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// By an access.
    Implicit,
    /// By KVM_HC_MAP_GPA_RANGE.
    Explicit,
    /// An access to a poisoned page.
    Poison,
}

impl Kind {
    /// The field's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Implicit => "implicit",
            Kind::Explicit => "explicit",
            Kind::Poison => "poison",
        }
    }
}

/// What was decided and what came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Converted, as asked or as the policy had it.
    Converted,
    /// Refused by the policy.
    Denied,
    /// To be tried again.
    Retried,
    /// The policy ended the run.
    Stopped,
    /// Another vCPU was faster; the guest looks again.
    Superseded,
    /// Decided to convert, but that failed.
    Failed,
    /// The poisoned page was freed.
    Discarded,
}

impl Outcome {
    /// One word.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Converted => "converted",
            Outcome::Denied => "denied",
            Outcome::Retried => "retried",
            Outcome::Stopped => "stopped",
            Outcome::Superseded => "superseded",
            Outcome::Failed => "failed",
            Outcome::Discarded => "discarded",
        }
    }
}

/// One request, from exit to resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Position among all events of the machine, from 0.
    pub sequence: u64,
    /// When it came: nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// The vCPU's index.
    pub vcpu: u32,
    /// How it came.
    pub kind: Kind,
    /// What was asked for: start, without the shared bit.
    pub gpa: u64,
    /// What was asked for: bytes.
    pub size: u64,
    /// What was asked for: the state.
    pub to: State,
    /// What came of it.
    pub outcome: Outcome,
    /// What was converted: start.
    pub done_gpa: u64,
    /// What was converted: bytes, 0 for none.
    pub done_size: u64,
    /// What it was converted to.
    pub done_to: State,
    /// Bytes whose state really changed.
    pub changed: u64,
    /// What the guest was told: 0, or a positive errno.
    pub errno: i32,
    /// Exit to resume, in nanoseconds.
    pub latency: u64,
}

struct Ring {
    events: Mutex<VecDeque<Event>>,
    /// No event of this vCPU that is still on its way here has a lower number.
    arriving: AtomicU64,
}

const NONE_ARRIVING: u64 = u64::MAX;

/// The last events of each vCPU. A full ring drops its oldest.
pub struct EventLog {
    rings: Vec<Ring>,
    capacity: usize,
    sequence: AtomicU64,
}

impl EventLog {
    /// Room for `capacity` events in all, 0 for none.
    pub fn new(capacity: usize, vcpus: usize) -> Self {
        Self {
            rings: (0..vcpus)
                .map(|_| Ring {
                    events: Mutex::default(),
                    arriving: AtomicU64::new(NONE_ARRIVING),
                })
                .collect(),
            capacity: capacity.div_ceil(vcpus.max(1)),
            sequence: AtomicU64::new(0),
        }
    }

    pub(crate) fn push(&self, mut event: Event) {
        let Some(ring) = self.rings.get(event.vcpu as usize) else {
            return;
        };
        ring.arriving
            .store(self.sequence.load(Ordering::SeqCst), Ordering::SeqCst);
        event.sequence = self.sequence.fetch_add(1, Ordering::SeqCst);
        if self.capacity > 0 {
            let mut events = ring.events.lock();
            if events.len() == self.capacity {
                events.pop_front();
            }
            events.push_back(event);
        }
        ring.arriving.store(NONE_ARRIVING, Ordering::SeqCst);
    }

    /// Events there were, kept or dropped.
    pub fn total(&self) -> u64 {
        self.sequence.load(Ordering::Relaxed)
    }

    /// Events that are kept.
    pub fn kept(&self) -> usize {
        self.rings.iter().map(|ring| ring.events.lock().len()).sum()
    }

    /// The events that are kept, from sequence `since` on, in order. One that is not here yet hides those after it, so
    /// that whoever goes on behind the last misses none.
    pub fn since(&self, since: u64) -> Vec<Event> {
        let total = self.sequence.load(Ordering::SeqCst);
        let arriving = self.rings.iter().map(|ring| ring.arriving.load(Ordering::SeqCst));
        let horizon = arriving.min().unwrap_or(total).min(total);
        let mut events: Vec<Event> = Vec::new();
        for ring in &self.rings {
            let ring = ring.events.lock();
            let start = ring.partition_point(|event| event.sequence < since);
            let end = ring.partition_point(|event| event.sequence < horizon);
            events.extend(ring.range(start.min(end)..end));
        }
        events.sort_unstable_by_key(|event| event.sequence);
        events
    }

    /// The last `n` events that asked for the page at `gpa`.
    pub(crate) fn about(&self, gpa: u64, n: usize) -> Vec<Event> {
        let mut events = self.since(0);
        events.retain(|event| event.gpa <= gpa && gpa - event.gpa < event.size);
        events.split_off(events.len().saturating_sub(n))
    }
}
