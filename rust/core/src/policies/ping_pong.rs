//! Pages that change hands all the time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::{Link, Request};
use crate::attributes::State;
use crate::error::Failure;
use crate::policy::{Decision, Policy};

/// Ends the run when a page is asked for in alternating states more than `limit` times within `window`: a guest bug, or
/// two vCPUs that fight. The reason names the page, how often, and how fast.
///
/// It remembers the last [`PAGES`] places that were asked for, so a guest cannot make it grow; one that alternates
/// between more places than that is slower than what this guards against.
pub struct PingPong {
    limit: usize,
    window: Duration,
    seen: Mutex<VecDeque<Seen>>,
    then: Arc<dyn Policy>,
}

/// Places that are remembered.
pub const PAGES: usize = 256;

/// A place that was asked for; the one seen last stands first.
struct Seen {
    gpa: u64,
    to: State,
    /// When it changed direction, in nanoseconds, `limit + 1` times at most.
    turns: VecDeque<u64>,
}

impl PingPong {
    /// `limit` is in 1..=65536; else `None`.
    pub fn new(limit: usize, window: Duration, then: Arc<dyn Policy>) -> Option<Self> {
        (1..=65536).contains(&limit).then(|| Self {
            limit,
            window,
            seen: Mutex::default(),
            then,
        })
    }

    /// The evidence, once it suffices.
    fn evidence(&self, request: Request<'_>) -> Option<String> {
        let (gpa, to, now) = (request.range().gpa(), request.to(), request.time());
        let mut seen = self.seen.lock();
        let known = seen
            .iter()
            .position(|seen| seen.gpa == gpa)
            .and_then(|at| seen.remove(at));
        let mut place = known.unwrap_or_else(|| Seen {
            gpa,
            to,
            turns: VecDeque::new(),
        });
        if place.to != to {
            place.to = to;
            place.turns.push_back(now);
        }
        let since = |turn: u64| Duration::from_nanos(now.saturating_sub(turn));
        while place.turns.front().is_some_and(|turn| since(*turn) > self.window) {
            place.turns.pop_front();
        }
        let turns = place.turns.len();
        let took = place.turns.front().map_or(Duration::ZERO, |first| since(*first));
        seen.truncate(PAGES - 1);
        if turns > self.limit {
            // A run that is taken up again starts counting again.
            return Some(format!(
                "ping-pong: {gpa:#x} changed direction {turns} times in {:.3} s (limit {} in {:.3} s), last to {to} by \
                 vCPU {}",
                took.as_secs_f64(),
                self.limit,
                self.window.as_secs_f64(),
                request.vcpu()
            ));
        }
        seen.push_front(place);
        None
    }
}

impl Link for PingPong {
    fn then(&self) -> &dyn Policy {
        self.then.as_ref()
    }

    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure> {
        match self.evidence(request) {
            Some(evidence) => Ok(Decision::Stop(evidence)),
            None => request.ask(self.then()),
        }
    }
}
