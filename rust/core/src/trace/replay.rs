//! The requests of a trace, put to other policies in the order in which the first one was asked.

use std::sync::Arc;

use super::about::About;
use super::data::{Trace, TraceError};
use crate::errno::Errno;
use crate::error::{Failure, Site};
use crate::events::event::{Event, Kind, Outcome, RecordedDecision, Verdict};
use crate::memory::address::{Range, State};
use crate::memory::page_map::AttributeMap;
use crate::policy::decision::Decision;
use crate::policy::hooks::Policy;
use crate::policy::request::{ExplicitRequest, ImplicitRequest};
use crate::policy::trial::{Question, Trial};

/// Requests between two looks at whether the caller wants to go on.
const PATIENCE: usize = 4096;

/// What one policy made of all requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// Decisions to convert.
    pub converted: u64,
    /// Decisions to refuse.
    pub denied: u64,
    /// Decisions to let the guest try again.
    pub retried: u64,
    /// Decisions to end the run.
    pub stopped: u64,
    /// Decisions to free a poisoned page.
    pub discarded: u64,
    /// Bytes that became private.
    pub bytes_to_private: u64,
    /// Bytes that became shared.
    pub bytes_to_shared: u64,
    /// The most bytes that were shared at any time.
    pub peak_shared: u64,
    /// Conversions that turned pages back of which some had been converted before.
    pub ping_pongs: u64,
    /// The first request at which the run would have ended, by its sequence number. What comes after it the guest might
    /// never have asked.
    pub ends: Option<u64>,
    /// Decisions that are not the recorded ones.
    pub differences: u64,
}

/// A request on which the policies and the record do not agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The request, with what was decided when it was recorded.
    pub event: Event,
    /// What each policy decided.
    pub decisions: Vec<Decision>,
}

/// What a replay found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// Requests.
    pub requests: u64,
    /// Requests that are missing, by the sequence numbers of the others.
    pub missing: u64,
    /// What was decided and done when the trace was recorded.
    pub recorded: Judged,
    /// What each policy would have decided and done.
    pub policies: Vec<Judged>,
    /// Requests on which they disagree; the first ones.
    pub differences: Vec<Difference>,
    /// How many there are in all.
    pub different: u64,
}

/// Why a replay ended early.
#[derive(Debug)]
pub enum ReplayError {
    /// The trace makes no sense.
    Trace(TraceError),
    /// A policy failed.
    Policy {
        /// Which one.
        policy: usize,
        /// The request's sequence number.
        sequence: u64,
        /// The request.
        site: Site,
        /// How it failed.
        failure: Failure,
    },
    /// The caller wanted no more.
    Interrupted(Failure),
}

/// What became of memory under one policy.
struct Timeline {
    /// Pages that were converted: private here.
    touched: AttributeMap,
    judged: Judged,
}

impl Timeline {
    fn new(about: &About, shared_bytes: u64) -> Self {
        let judged = Judged {
            peak_shared: shared_bytes,
            ..Judged::default()
        };
        Self {
            touched: AttributeMap::new(about.memory(), State::Shared),
            judged,
        }
    }

    /// Counts a decision; whether the run would have ended there.
    fn count(&mut self, event: &Event, verdict: Verdict) {
        let judged = &mut self.judged;
        let ends = match verdict {
            Verdict::Convert => {
                judged.converted += 1;
                false
            }
            Verdict::Deny => {
                judged.denied += 1;
                event.kind != Kind::Explicit
            }
            Verdict::Retry => {
                judged.retried += 1;
                false
            }
            Verdict::Discard => {
                judged.discarded += 1;
                false
            }
            Verdict::Stop => {
                judged.stopped += 1;
                true
            }
            Verdict::None => true,
        };
        if ends {
            judged.ends.get_or_insert(event.sequence);
        }
    }

    /// `changed` bytes of a range were converted; `shared_bytes` are shared then.
    fn done(&mut self, range: Range, to: State, changed: u64, shared_bytes: u64) {
        if changed == 0 {
            return;
        }
        match to {
            State::Private => self.judged.bytes_to_private += changed,
            State::Shared => self.judged.bytes_to_shared += changed,
        }
        self.judged.peak_shared = self.judged.peak_shared.max(shared_bytes);
        let before = self.touched.uniform(range) != Some(State::Shared);
        self.judged.ping_pongs += u64::from(before);
        self.touched.set(range, State::Private);
    }
}

/// A request as a machine would put it; `None` if it lies outside of memory.
fn question(event: &Event, memory: u64) -> Option<Question> {
    let range = Range::new(event.gpa, event.size).filter(|range| range.end() <= memory)?;
    let implicit = |errno| ImplicitRequest {
        vcpu: event.vcpu,
        range,
        access: event.to,
        flags: event.flags.into(),
        errno: Errno(errno),
        state: event.state.unwrap_or(event.to.other()),
        rip: event.rip,
        repeats: event.repeats,
        time: event.time,
        memory,
    };
    Some(match event.kind {
        Kind::Implicit => Question::Implicit(implicit(libc::EFAULT)),
        Kind::Poison => Question::Poison(implicit(libc::EHWPOISON)),
        Kind::Explicit => Question::Explicit(ExplicitRequest {
            vcpu: event.vcpu,
            range,
            to: event.to,
            page_size: event.page_size.into(),
            raw: event.raw.into(),
            state: event.state,
            time: event.time,
            memory,
        }),
    })
}

/// Puts every request of a trace to each of these policies. `keep` is how many of the differences are kept; `watch` is
/// asked now and then whether to go on.
///
/// What the trace does not hold, conversions by the host and requests that are missing, is taken over from the states
/// that later requests met. Where several vCPUs were at the same pages at once, what was decided first need not have been
/// done first, so quotas may be met a little earlier or later than they were.
///
/// # Errors
/// See [`ReplayError`].
pub fn replay(
    trace: &Trace,
    policies: &[Arc<dyn Policy>],
    keep: usize,
    watch: &mut dyn FnMut() -> Result<(), Failure>,
) -> Result<Replay, ReplayError> {
    let memory = trace.about.memory();
    let mut order: Vec<&Event> = trace.events.iter().collect();
    order.sort_by_key(|event| (event.time, event.sequence));
    let mut states = trace.about.model();
    let timeline = || Timeline::new(&trace.about, trace.about.model().shared_bytes());
    let mut recorded = timeline();
    let trial = |policy: &Arc<dyn Policy>| (Trial::of(policy.clone(), trace.about.model()), timeline());
    let mut trials: Vec<(Trial, Timeline)> = policies.iter().map(trial).collect();
    let (mut differences, mut different) = (Vec::new(), 0);
    for (number, event) in order.iter().enumerate() {
        if number % PATIENCE == 0 {
            watch().map_err(ReplayError::Interrupted)?;
        }
        let question = question(event, memory).ok_or_else(|| outside(event, memory))?;
        let range = question.range();
        if let Some(state) = event.state
            && states.map().uniform(range) != Some(state)
        {
            states.set(range, state);
            trials.iter().for_each(|(trial, _)| trial.set(range, state));
        }
        let mut decisions = Vec::new();
        let mut differ = false;
        for (policy, (trial, timeline)) in trials.iter_mut().enumerate() {
            // Where another vCPU was faster then, whatever is decided changes nothing.
            let carried = trial.carry_out(&question, event.outcome != Outcome::Superseded);
            let carried = carried.map_err(|failure| ReplayError::Policy {
                policy,
                sequence: event.sequence,
                site: site(event),
                failure,
            })?;
            let decision = RecordedDecision::of(&carried.decision, range, event.to);
            timeline.count(event, decision.verdict);
            if let Some((range, to)) = carried.done {
                timeline.done(range, to, carried.changed, trial.shared_bytes());
            }
            if event.decision.verdict != Verdict::None && decision != event.decision {
                timeline.judged.differences += 1;
                differ = true;
            }
            decisions.push((carried.decision, decision));
        }
        recorded.count(event, event.decision.verdict);
        if let Some(range) = Range::new(event.done_gpa, event.done_size).filter(|range| range.end() <= memory) {
            states.set(range, event.done_to);
            recorded.done(range, event.done_to, event.changed, states.shared_bytes());
        }
        differ |= decisions.windows(2).any(|pair| pair[0].1 != pair[1].1);
        if differ {
            different += 1;
            if differences.len() < keep {
                differences.push(Difference {
                    event: **event,
                    decisions: decisions.into_iter().map(|(decision, _)| decision).collect(),
                });
            }
        }
    }
    let last = trace.events.iter().map(|event| event.sequence).max();
    let span = last.map_or(0, |last| last.saturating_sub(trace.about.first()).saturating_add(1));
    Ok(Replay {
        requests: order.len() as u64,
        missing: span.saturating_sub(order.len() as u64),
        recorded: recorded.judged,
        policies: trials.into_iter().map(|(_, timeline)| timeline.judged).collect(),
        differences,
        different,
    })
}

fn site(event: &Event) -> Site {
    Site {
        vcpu: event.vcpu,
        gpa: Some(event.gpa),
        state: Some(event.state.map_or("mixed", State::as_str)),
        rip: event.rip,
    }
}

fn outside(event: &Event, memory: u64) -> ReplayError {
    ReplayError::Trace(TraceError::Invalid(format!(
        "event {}: {:#x} + {:#x} is no page-aligned part of {memory:#x} bytes of memory",
        event.sequence, event.gpa, event.size
    )))
}
