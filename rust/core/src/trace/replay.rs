//! Puts the requests of a trace to other policies, in the order in which the recorded policy was asked.

use std::sync::Arc;

use super::about::About;
use super::data::{Trace, TraceError};
use crate::errno::Errno;
use crate::error::{Failure, Site};
use crate::events::event::{Event, Kind, Outcome, RecordedDecision, Verdict};
use crate::memory::address::{Range, State};
use crate::memory::page_map::AttributeMap;
use crate::memory::views::Views;
use crate::policy::decision::Decision;
use crate::policy::hooks::Policy;
use crate::policy::request::{ExplicitRequest, ImplicitRequest};
use crate::policy::trial::{Question, Trial};

/// How many requests are replayed between two calls of `watch`.
const WATCH_EVERY: usize = 4096;
/// The most bytes of a page map: some, and so many for each request. A request that touches memory far from all others
/// takes 4 KiB, which no guest does for long.
const SOME_BYTES: u64 = 32 << 20;
const BYTES_OF_REQUEST: u64 = 1024;

/// What one policy decided on all requests, and what came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// Decisions to convert.
    pub converted: u64,
    /// Decisions to refuse (Deny).
    pub denied: u64,
    /// Decisions to let the guest try again (Retry, Wait).
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
    /// Conversions of ranges of which some pages had been converted before.
    pub ping_pongs: u64,
    /// The sequence number of the first request at which the run would have ended. The guest might never have made
    /// those after it.
    pub ends: Option<u64>,
    /// Decisions that differ from the recorded ones.
    pub differences: u64,
}

/// A request on which the policies differ from each other or from the recorded decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The request, with what was decided when it was recorded.
    pub event: Event,
    /// What each policy decided.
    pub decisions: Vec<Decision>,
}

/// The result of a replay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// How many requests were replayed.
    pub requests: u64,
    /// How many requests are missing from the trace: gaps in its sequence numbers.
    pub missing: u64,
    /// What was decided and done when the trace was recorded.
    pub recorded: Judged,
    /// What each policy would have decided and done.
    pub policies: Vec<Judged>,
    /// The first requests on which the decisions differ.
    pub differences: Vec<Difference>,
    /// How many there are in all.
    pub different: u64,
}

/// Why a replay ended early.
#[derive(Debug)]
pub enum ReplayError {
    /// The trace has a request outside of its machine's memory.
    Trace(TraceError),
    /// A policy failed.
    Policy {
        /// Its index.
        policy: usize,
        /// The request's sequence number.
        sequence: u64,
        /// The request.
        site: Site,
        /// Its failure.
        failure: Failure,
    },
    /// `watch` failed: the caller wants the replay to end.
    Interrupted(Failure),
}

/// The counts of one policy, and the pages that it converted.
struct Timeline {
    /// The pages that were converted are private in this map.
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

    /// Counts a decision, and notes the first at which the run would have ended.
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

    /// Counts a conversion of `range` that changed the state of `changed` bytes. `shared_bytes` are shared after it.
    fn done(&mut self, range: Range, to: State, changed: u64, shared_bytes: u64) {
        if changed == 0 {
            return;
        }
        match to {
            State::Private => add(&mut self.judged.bytes_to_private, changed),
            State::Shared => add(&mut self.judged.bytes_to_shared, changed),
        }
        self.judged.peak_shared = self.judged.peak_shared.max(shared_bytes);
        let before = self.touched.uniform(range) != Some(State::Shared);
        self.judged.ping_pongs += u64::from(before);
        self.touched.set(range, State::Private);
    }
}

/// What a trace says was changed can be any number.
fn add(sum: &mut u64, changed: u64) {
    *sum = sum.saturating_add(changed);
}

/// The request as a machine would put it to a policy; `None` if it is not a part of memory, or no policy is asked.
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
        // Not recorded.
        executed: false,
        repeats: event.repeats,
        time: event.time,
        memory: Views::new(memory, None, None),
    };
    Some(match event.kind {
        Kind::Implicit => Question::Implicit(implicit(libc::EFAULT)),
        Kind::Unpaged | Kind::Device | Kind::Malformed | Kind::Missing => return None,
        Kind::Poison => Question::Poison(implicit(libc::EHWPOISON)),
        Kind::Explicit => Question::Explicit(ExplicitRequest {
            vcpu: event.vcpu,
            range,
            to: event.to,
            page_size: event.page_size.into(),
            raw: event.raw.into(),
            state: event.state,
            time: event.time,
            memory: Views::new(memory, None, None),
        }),
    })
}

/// Puts every request of a trace to each of these policies. `keep` is the most differences to return. `watch` is called
/// every few thousand requests, and its failure ends the replay.
///
/// The trace does not hold conversions by the host, and requests may be missing. Where a request was recorded with a
/// state that the conversions before it do not explain, the replay takes that state over. Where several vCPUs asked for
/// the same pages at once, conversions may have been carried out in another order than they were decided in, so a quota
/// may be reached a little earlier or later than it was.
///
/// Takes at most 64 MiB and 2 KiB for each request of memory, and 8 MiB for each TiB of guest memory, for each policy and
/// once more.
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
    // A map has some bytes for each block, whether it is touched or not.
    let at_first = trace.about.model().map().memory() as u64;
    let most = at_first + SOME_BYTES + trace.events.len() as u64 * BYTES_OF_REQUEST;
    let judged = |event: &&Event| event.kind.is_request();
    let mut order: Vec<&Event> = trace.events.iter().filter(judged).collect();
    order.sort_by_key(|event| (event.time, event.sequence));
    let mut states = trace.about.model();
    let timeline = || Timeline::new(&trace.about, trace.about.model().shared_bytes());
    let mut recorded = timeline();
    let trial = |policy: &Arc<dyn Policy>| (Trial::of(policy.clone(), trace.about.model()), timeline());
    let mut trials: Vec<(Trial, Timeline)> = policies.iter().map(trial).collect();
    let (mut differences, mut different) = (Vec::new(), 0);
    for (number, event) in order.iter().enumerate() {
        if number % WATCH_EVERY == 0 {
            watch().map_err(ReplayError::Interrupted)?;
            let maps = [states.map(), &recorded.touched];
            let maps = maps
                .into_iter()
                .chain(trials.iter().map(|(_, timeline)| &timeline.touched));
            if maps.map(AttributeMap::memory).any(|bytes| bytes as u64 > most) {
                return Err(scattered(event));
            }
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
            let carried = trial.carry_out(&question, !was_prevented(event));
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
        missing: span.saturating_sub(trace.events.len() as u64),
        recorded: recorded.judged,
        policies: trials.into_iter().map(|(_, timeline)| timeline.judged).collect(),
        differences,
        different,
    })
}

/// Whether the request was to be converted and was not: another vCPU was faster, or the policy was asked too often because
/// its pages kept changing. Nor is it converted in a replay.
fn was_prevented(event: &Event) -> bool {
    match event.outcome {
        Outcome::Superseded => true,
        Outcome::Retried => event.decision.verdict == Verdict::Convert && event.done_size == 0,
        _ => false,
    }
}

fn site(event: &Event) -> Site {
    Site {
        vcpu: event.vcpu,
        gpa: Some(event.gpa),
        state: Some(event.state.map_or("mixed", State::as_str)),
        rip: event.rip,
        symbol: None,
    }
}

fn scattered(event: &Event) -> ReplayError {
    ReplayError::Trace(TraceError::Invalid(format!(
        "event {}: the requests of this trace are scattered over more memory than a replay can keep the states of",
        event.sequence
    )))
}

fn outside(event: &Event, memory: u64) -> ReplayError {
    ReplayError::Trace(TraceError::Invalid(format!(
        "event {}: {:#x} + {:#x} is no page-aligned part of {memory:#x} bytes of memory",
        event.sequence, event.gpa, event.size
    )))
}
