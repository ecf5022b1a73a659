//! Pages that change hands all the time.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::chain::Link;
use super::decision::Decision;
use super::hooks::Policy;
use super::request::Request;
use crate::error::Failure;
use crate::memory::address::{Range, State};

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

/// Pages that were asked for; those seen last stand first, and no two overlap.
struct Seen {
    range: Range,
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
        let (range, to, now) = (request.range(), request.to(), request.time());
        let mut seen = self.seen.lock();
        let mut turned = self.turn(&mut seen, range, to, now);
        let most = turned.iter().max_by_key(|place| place.turns.len());
        if let Some(place) = most.filter(|place| place.turns.len() > self.limit) {
            // A run that is taken up again starts counting again.
            let first = place.turns.front().copied().unwrap_or(now);
            return Some(format!(
                "ping-pong: {:#x} changed direction {} times in {:.3} s (limit {} in {:.3} s), last to {to} by vCPU {}",
                place.range.gpa(),
                place.turns.len(),
                Duration::from_nanos(now.saturating_sub(first)).as_secs_f64(),
                self.limit,
                self.window.as_secs_f64(),
                request.vcpu()
            ));
        }
        if turned.is_empty() {
            turned.push(Seen {
                range,
                to,
                turns: VecDeque::new(),
            });
        }
        for place in turned {
            seen.push_front(place);
        }
        seen.truncate(PAGES);
        None
    }

    /// Takes out what is known of these pages, wherever they were asked for together with others: a guest that asks for
    /// other ranges around the same page is not spared. What is left of each place are the pages in common.
    fn turn(&self, seen: &mut VecDeque<Seen>, range: Range, to: State, now: u64) -> Vec<Seen> {
        let mut turned = Vec::new();
        let mut at = 0;
        while let Some(place) = seen.get(at) {
            match place.range.intersect(&range) {
                Some(common) => turned.extend(seen.remove(at).map(|place| Seen { range: common, ..place })),
                None => at += 1,
            }
        }
        for place in &mut turned {
            if place.to != to {
                place.to = to;
                place.turns.push_back(now);
            }
            let since = |turn: u64| Duration::from_nanos(now.saturating_sub(turn));
            while place.turns.front().is_some_and(|turn| since(*turn) > self.window) {
                place.turns.pop_front();
            }
        }
        turned
    }
}

impl Link for PingPong {
    fn then(&self) -> &dyn Policy {
        self.then.as_ref()
    }

    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure> {
        match self.evidence(request) {
            Some(evidence) => Ok(Decision::Stop(evidence)),
            None => self.then().judge(request),
        }
    }
}
