//! A limit on how often a page is converted back and forth.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::chain::Link;
use super::decision::Decision;
use super::hooks::Policy;
use super::knowledge::{Knowledge, Turned};
use super::request::Request;
use crate::error::Failure;
use crate::memory::address::{Range, State};

/// Ends the run when the state of a page that was requested, or that it was converted to with others, changes more than
/// `limit` times within `window`: a guest bug, or two vCPUs that want pages in different states. The reason has the page,
/// how often, and in which time.
///
/// It keeps the last [`RANGES`] ranges that were asked for or converted, so a guest cannot make it grow. A guest that goes
/// round more ranges than that is not detected.
pub struct PingPong {
    limit: usize,
    window: Duration,
    recent: Mutex<VecDeque<Recent>>,
    then: Arc<dyn Policy>,
}

/// How many ranges are kept.
pub const RANGES: usize = 256;

/// A range that was asked for or converted. In the list the latest is first, and no two overlap.
struct Recent {
    range: Range,
    /// The state that was last asked for, or that it was last converted to.
    to: State,
    /// When that changed, in nanoseconds; before 0 what is older than the host's clock. At most the last `limit + 1` times.
    turns: VecDeque<i64>,
}

impl PingPong {
    /// `limit` is in 1..=65536; else `None`.
    pub fn new(limit: usize, window: Duration, then: Arc<dyn Policy>) -> Option<Self> {
        (1..=65536).contains(&limit).then(|| Self {
            limit,
            window,
            recent: Mutex::default(),
            then,
        })
    }

    /// Notes a request. Returns the reason to end the run, once there is one.
    fn ask(&self, request: Request<'_>) -> Option<String> {
        let (range, to, now) = (request.range(), request.to(), request.time());
        let mut recent = self.recent.lock();
        let touched = self.take_out(&mut recent, range, to, now);
        let most = touched.iter().max_by_key(|entry| entry.turns.len());
        if let Some(entry) = most.filter(|entry| entry.turns.len() > self.limit) {
            // The entries stay taken out: if the machine is run again, counting starts again.
            let first = entry.turns.front().map_or(Duration::ZERO, |turn| age(now, *turn));
            return Some(format!(
                "ping-pong: {:#x} changed direction {} times in {:.3} s (limit {} in {:.3} s), last to {to} by vCPU {}",
                entry.range.gpa(),
                entry.turns.len(),
                first.as_secs_f64(),
                self.limit,
                self.window.as_secs_f64(),
                request.vcpu()
            ));
        }
        put_back(&mut recent, range, to, touched);
        None
    }

    /// Takes out the pages of the range that are in the list, and brings them up to date. Entries are cut at the range's
    /// ends, and what lies outside stays as it is: a guest cannot avoid being counted by asking for different ranges
    /// around the same page.
    fn take_out(&self, recent: &mut VecDeque<Recent>, range: Range, to: State, now: u64) -> Vec<Recent> {
        let mut touched = Vec::new();
        let mut left = VecDeque::with_capacity(recent.len());
        for entry in recent.drain(..) {
            let Some(common) = entry.range.intersect(&range) else {
                left.push_back(entry);
                continue;
            };
            left.extend(outside(entry.range, common).map(|range| Recent {
                range,
                to: entry.to,
                turns: entry.turns.clone(),
            }));
            touched.push(Recent { range: common, ..entry });
        }
        *recent = left;
        for entry in &mut touched {
            if entry.to != to {
                entry.to = to;
                entry.turns.push_back(now.cast_signed());
            }
            while entry.turns.front().is_some_and(|turn| age(now, *turn) > self.window) {
                entry.turns.pop_front();
            }
        }
        touched
    }
}

/// How long ago that was.
fn age(now: u64, turn: i64) -> Duration {
    Duration::from_nanos(now.cast_signed().saturating_sub(turn).max(0).cast_unsigned())
}

/// Adds what was taken out of the list, and the rest of the range.
fn put_back(recent: &mut VecDeque<Recent>, range: Range, to: State, touched: Vec<Recent>) {
    let new = uncovered(range, &touched).map(|range| Recent {
        range,
        to,
        turns: VecDeque::new(),
    });
    for entry in new.chain(touched) {
        recent.push_front(entry);
    }
    recent.truncate(RANGES);
}

/// What is left of a range before and after a part of it.
fn outside(range: Range, part: Range) -> impl Iterator<Item = Range> {
    let before = Range::new(range.gpa(), part.gpa() - range.gpa());
    let after = Range::new(part.end(), range.end() - part.end());
    before.into_iter().chain(after)
}

/// The parts of a range that none of the entries, all inside of it, covers.
fn uncovered(range: Range, entries: &[Recent]) -> impl Iterator<Item = Range> + use<> {
    let mut covered: Vec<Range> = entries.iter().map(|entry| entry.range).collect();
    covered.sort_unstable_by_key(Range::gpa);
    let starts: Vec<u64> = [range.gpa()]
        .into_iter()
        .chain(covered.iter().map(Range::end))
        .collect();
    let ends = covered.into_iter().map(|range| range.gpa()).chain([range.end()]);
    starts
        .into_iter()
        .zip(ends)
        .filter_map(|(start, end)| Range::new(start, end - start))
}

impl Link for PingPong {
    fn then(&self) -> &dyn Policy {
        self.then.as_ref()
    }

    fn judge(&self, request: Request<'_>) -> Result<Decision, Failure> {
        match self.ask(request) {
            Some(reason) => Ok(Decision::Stop(reason)),
            None => self.then().judge(request),
        }
    }

    fn note_converted(&self, request: Request<'_>, range: Range, to: State) {
        let mut recent = self.recent.lock();
        // The next request that touches them is the one to end the run.
        let touched = self.take_out(&mut recent, range, to, request.time());
        put_back(&mut recent, range, to, touched);
    }

    fn knowledge(&self, now: u64) -> Option<Knowledge> {
        let recent = self.recent.lock();
        let turned = |entry: &Recent| Turned {
            gpa: entry.range.gpa(),
            size: entry.range.size(),
            private: entry.to == State::Private,
            ages: entry
                .turns
                .iter()
                .map(|turn| age(now, *turn).as_nanos() as u64)
                .collect(),
        };
        Some(Knowledge::Turns(recent.iter().map(turned).collect()))
    }

    fn learn(&self, now: u64, knowledge: Option<&Knowledge>) {
        let turned = match knowledge {
            Some(Knowledge::Turns(turned)) => turned.as_slice(),
            _ => &[],
        };
        let mut recent = VecDeque::<Recent>::new();
        for turned in turned.iter().take(RANGES) {
            let range = Range::new(turned.gpa, turned.size);
            let Some(range) = range.filter(|range| !recent.iter().any(|known| known.range.overlaps(range))) else {
                continue;
            };
            let mut turns: Vec<i64> = (turned.ages.iter().rev().take(self.limit + 1))
                .map(|age| now.cast_signed().saturating_sub_unsigned(*age))
                .collect();
            turns.sort_unstable();
            recent.push_back(Recent {
                range,
                to: if turned.private { State::Private } else { State::Shared },
                turns: turns.into(),
            });
        }
        *self.recent.lock() = recent;
    }
}
