//! Decisions that hold for more than one request: later requests of the same kind in the same region are answered by them,
//! without asking the policy again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;

use super::decision::{Convert, Decision, Lesson, Region};
use super::hooks::Policy;
use super::request::{ExplicitRequest, ImplicitRequest, Request};
use crate::error::Failure;
use crate::memory::address::{Range, State};

/// Pieces of rules that are kept. A guest that makes its policy learn more pushes the oldest rules out, and then the
/// policy is asked again.
pub const MOST: usize = 4096;

/// Remembers what the policy inside of it says about whole regions ([`Decision::Remember`]).
pub struct Remember<P> {
    rules: Rules,
    policy: P,
}

impl<P: Policy> Remember<P> {
    /// Around this policy, with nothing learned.
    pub fn new(policy: P) -> Self {
        let rules = Rules::default();
        Self { rules, policy }
    }

    /// The policy inside.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// Forgets what was learned about these pages, or everything. What the policy is being asked right now is not
    /// remembered any more either.
    pub fn forget(&self, range: Option<Range>) {
        self.rules.forget(range);
    }

    /// Requests that were answered without asking the policy.
    pub fn spared(&self) -> u64 {
        self.rules.spared.load(Ordering::Relaxed)
    }
}

impl<P: Policy> Policy for Remember<P> {
    fn memory_fault(&self, fault: &ImplicitRequest) -> Result<Decision, Failure> {
        self.rules
            .ask(Request::Implicit(fault), || self.policy.memory_fault(fault))
    }

    fn map_gpa_range(&self, call: &ExplicitRequest) -> Result<Decision, Failure> {
        self.rules
            .ask(Request::Explicit(call), || self.policy.map_gpa_range(call))
    }

    fn memory_poison(&self, poison: &ImplicitRequest) -> Result<Decision, Failure> {
        match self.policy.memory_poison(poison)? {
            Decision::Remember(_) => {
                Err("memory_poison cannot answer with remember: each poisoned page is a case of its own".into())
            }
            decision => Ok(decision),
        }
    }
}

/// What was learned. Each of the four kinds of request has its own rules: implicit or explicit, to private or to shared.
#[derive(Default)]
struct Rules {
    taught: RwLock<Taught>,
    /// Whether anything was ever learned. Until then a request need not look.
    any: AtomicBool,
    /// Grows whenever rules are forgotten, with `taught` locked: what was asked before that teaches nothing any more.
    epoch: AtomicU64,
    spared: AtomicU64,
}

#[derive(Default)]
struct Taught {
    learned: u64,
    kinds: [Pieces; 4],
}

struct Rule {
    number: u64,
    decision: Decision,
    left: Option<AtomicU64>,
    until: Option<u64>,
}

/// A rule, or what later ones left of it.
struct Piece {
    end: u64,
    rule: Arc<Rule>,
}

/// By their start; no two overlap.
#[derive(Default)]
struct Pieces(BTreeMap<u64, Piece>);

impl Rules {
    /// Answers a request by what was learned, else by what the policy says, which may be something to remember.
    fn ask(
        &self,
        request: Request<'_>,
        policy: impl FnOnce() -> Result<Decision, Failure>,
    ) -> Result<Decision, Failure> {
        let epoch = self.epoch.load(Ordering::SeqCst);
        if self.any.load(Ordering::SeqCst)
            && let Some(known) = self.taught.read().kinds[kind(request)].find(request)
        {
            self.spared.fetch_add(1, Ordering::Relaxed);
            return Ok(known);
        }
        match policy()? {
            Decision::Remember(lesson) => {
                let Lesson { decision, region } = *lesson;
                self.learn(request, lasting(request, &decision, region)?, region, epoch);
                Ok(decision)
            }
            decision => Ok(decision),
        }
    }

    fn learn(&self, request: Request<'_>, decision: Decision, region: Region, epoch: u64) {
        let mut taught = self.taught.write();
        if self.epoch.load(Ordering::SeqCst) != epoch {
            return;
        }
        self.any.store(true, Ordering::SeqCst);
        taught.learned += 1;
        let rule = Arc::new(Rule {
            number: taught.learned,
            decision,
            left: region.uses.map(AtomicU64::new),
            until: region.nanoseconds.map(|time| request.time().saturating_add(time)),
        });
        let (start, end) = (region.range.gpa(), region.range.end());
        let pieces = &mut taught.kinds[kind(request)];
        pieces.cut(start, end);
        pieces.0.insert(start, Piece { end, rule });
        if taught.len() > MOST {
            taught.make_room(request.time());
        }
    }

    fn forget(&self, range: Option<Range>) {
        let mut taught = self.taught.write();
        self.epoch.fetch_add(1, Ordering::SeqCst);
        for pieces in &mut taught.kinds {
            match range {
                Some(range) => pieces.cut(range.gpa(), range.end()),
                None => pieces.0.clear(),
            }
        }
    }
}

impl Taught {
    fn len(&self) -> usize {
        self.kinds.iter().map(|pieces| pieces.0.len()).sum()
    }

    /// Drops what answers nothing any more, or else the oldest rule.
    fn make_room(&mut self, now: u64) {
        self.retain(|rule| rule.holds(now));
        while self.len() > MOST {
            let pieces = self.kinds.iter().flat_map(|pieces| pieces.0.values());
            let oldest = pieces.map(|piece| piece.rule.number).min();
            self.retain(|rule| Some(rule.number) != oldest);
        }
    }

    fn retain(&mut self, keep: impl Fn(&Rule) -> bool) {
        for pieces in &mut self.kinds {
            pieces.0.retain(|_, piece| keep(&piece.rule));
        }
    }
}

impl Rule {
    fn holds(&self, now: u64) -> bool {
        let in_time = self.until.is_none_or(|until| now < until);
        in_time && self.left.as_ref().is_none_or(|left| left.load(Ordering::Relaxed) > 0)
    }

    /// Uses it once, if it holds.
    fn answer(&self, now: u64) -> Option<Decision> {
        if self.until.is_some_and(|until| now >= until) {
            return None;
        }
        if let Some(left) = &self.left {
            let use_one = |left: u64| left.checked_sub(1);
            left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, use_one).ok()?;
        }
        Some(self.decision.clone())
    }
}

impl Pieces {
    fn find(&self, request: Request<'_>) -> Option<Decision> {
        let range = request.range();
        let (_, piece) = self.0.range(..=range.gpa()).next_back()?;
        (range.end() <= piece.end)
            .then(|| piece.rule.answer(request.time()))
            .flatten()
    }

    /// Takes `[start, end)` out.
    fn cut(&mut self, start: u64, end: u64) {
        let before = self.0.range_mut(..start).next_back();
        if let Some((_, piece)) = before.filter(|(_, piece)| piece.end > start) {
            let tail = Piece {
                end: piece.end,
                rule: piece.rule.clone(),
            };
            piece.end = start;
            if tail.end > end {
                self.0.insert(end, tail);
            }
        }
        while let Some(inside) = self.0.range(start..end).next().map(|(start, _)| *start)
            && let Some(piece) = self.0.remove(&inside)
        {
            if piece.end > end {
                self.0.insert(end, piece);
            }
        }
    }
}

fn kind(request: Request<'_>) -> usize {
    let explicit = matches!(request, Request::Explicit(_));
    usize::from(explicit) * 2 + usize::from(request.to() == State::Shared)
}

/// The decision as it is right for every request in the region.
fn lasting(request: Request<'_>, decision: &Decision, region: Region) -> Result<Decision, Failure> {
    let Region { range, .. } = region;
    if range.end() > request.memory() {
        let (gpa, size, memory) = (range.gpa(), range.size(), request.memory());
        return Err(format!("Region({gpa:#x}, {size:#x}) does not lie in the guest's {memory:#x} bytes").into());
    }
    match decision {
        Decision::Convert(Convert {
            gpa: None, size: None, ..
        })
        | Decision::Deny(_)
        | Decision::Retry => Ok(decision.clone()),
        // Other pages than those asked for: they have to be right for whoever is answered by this.
        Decision::Convert(convert) => {
            let (start, end, _) = request.target(convert);
            if range.gpa() < start || end < range.end() {
                return Err(format!(
                    "remember: {:#x} to {:#x} would be converted for requests from all of {:#x} to {:#x}, but do not \
                     hold them",
                    start,
                    end,
                    range.gpa(),
                    range.end()
                )
                .into());
            }
            Ok(Decision::Convert(Convert {
                gpa: Some(start),
                size: Some(end - start),
                ..*convert
            }))
        }
        Decision::Wait(_) | Decision::Discard | Decision::Stop(_) | Decision::Remember(_) => {
            Err("remember: only Convert, Deny and Retry can be remembered".into())
        }
    }
}
