//! Remembered decisions: they answer later requests of the same kind in the same region, without asking the policy
//! again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;

use super::decision::{Convert, Decision, Region, RegionDecision};
use super::device_access::DeviceAccess;
use super::hooks::Policy;
use super::knowledge::Knowledge;
use super::request::{ExplicitRequest, ImplicitRequest, Request};
use crate::error::Failure;
use crate::memory::address::{Range, State};

/// The most pieces of rules that are kept. Above it the oldest rule is dropped, and the policy is asked again. So a
/// guest cannot make the rules grow.
pub const MAX_PIECES: usize = 4096;

/// Wraps a policy and remembers its decisions about regions ([`Decision::Remember`]).
pub struct Remember<P> {
    rules: Rules,
    policy: P,
}

impl<P: Policy> Remember<P> {
    /// Wraps this policy, without any rule.
    pub fn new(policy: P) -> Self {
        let rules = Rules::default();
        Self { rules, policy }
    }

    /// The wrapped policy.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// Drops the rules for these pages, or all rules. Decisions on requests that the policy is being asked about at
    /// this moment are not remembered either.
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
        let request = Request::Implicit(fault);
        let wants = || self.policy.wants(request);
        self.rules.ask(request, wants, || self.policy.memory_fault(fault))
    }

    fn map_gpa_range(&self, call: &ExplicitRequest) -> Result<Decision, Failure> {
        let request = Request::Explicit(call);
        let wants = || self.policy.wants(request);
        self.rules.ask(request, wants, || self.policy.map_gpa_range(call))
    }

    fn memory_poison(&self, poison: &ImplicitRequest) -> Result<Decision, Failure> {
        match self.policy.memory_poison(poison)? {
            Decision::Remember(_) => {
                Err("memory_poison cannot answer with remember: each poisoned page is a case of its own".into())
            }
            decision => Ok(decision),
        }
    }

    fn device_access(&self, access: &DeviceAccess) -> Result<Decision, Failure> {
        self.policy.device_access(access)
    }

    fn wants(&self, request: Request<'_>) -> bool {
        self.policy.wants(request)
    }

    fn converted(&self, request: Request<'_>, range: Range, to: State) {
        self.policy.converted(request, range, to);
    }

    fn tell(&self, now: u64, known: &mut Vec<Option<Knowledge>>) {
        self.policy.tell(now, known);
    }

    /// The policy is asked again: what answers for it must be its own, and a file's would not be.
    fn recall(&self, now: u64, known: &[Option<Knowledge>]) {
        self.forget(None);
        self.policy.recall(now, known);
    }
}

/// The remembered decisions. Each of the four kinds of request has its own: implicit or explicit, to private or to
/// shared.
#[derive(Default)]
struct Rules {
    tables: RwLock<Tables>,
    /// Whether there ever was a rule. Until then a request does not take the lock.
    any: AtomicBool,
    /// Counts the calls of `forget`; written with `tables` locked. A decision that was asked for before the last call
    /// makes no rule.
    epoch: AtomicU64,
    spared: AtomicU64,
}

#[derive(Default)]
struct Tables {
    /// The number of the latest rule.
    last: u64,
    kinds: [Pieces; 4],
}

struct Rule {
    /// Rules are numbered in the order in which they were made.
    number: u64,
    decision: Decision,
    /// How many more requests it answers; `None`: any number.
    left: Option<AtomicU64>,
    /// The time from which on it answers none, in nanoseconds.
    until: Option<u64>,
}

/// The pages of a rule, or the part of them that later rules do not cover.
struct Piece {
    end: u64,
    rule: Arc<Rule>,
}

/// By their first gpa. No two overlap.
#[derive(Default)]
struct Pieces(BTreeMap<u64, Piece>);

impl Rules {
    /// Answers a request by a rule, if one holds for it and the policy wants such requests. Else asks the policy, and
    /// makes a rule if it says so.
    fn ask(
        &self,
        request: Request<'_>,
        wants: impl FnOnce() -> bool,
        policy: impl FnOnce() -> Result<Decision, Failure>,
    ) -> Result<Decision, Failure> {
        let epoch = self.epoch.load(Ordering::SeqCst);
        if self.any.load(Ordering::SeqCst)
            && wants()
            && let Some(known) = self.tables.read().kinds[kind(request)].find(request)
        {
            self.spared.fetch_add(1, Ordering::Relaxed);
            return Ok(known);
        }
        match policy()? {
            Decision::Remember(remembered) => {
                let RegionDecision { decision, region } = *remembered;
                self.add(request, for_region(request, &decision, region)?, region, epoch);
                Ok(decision)
            }
            decision => Ok(decision),
        }
    }

    /// Makes a rule, unless rules were dropped since `epoch`.
    fn add(&self, request: Request<'_>, decision: Decision, region: Region, epoch: u64) {
        let mut tables = self.tables.write();
        if self.epoch.load(Ordering::SeqCst) != epoch {
            return;
        }
        self.any.store(true, Ordering::SeqCst);
        tables.last += 1;
        let rule = Arc::new(Rule {
            number: tables.last,
            decision,
            left: region.uses.map(AtomicU64::new),
            until: region.nanoseconds.map(|time| request.time().saturating_add(time)),
        });
        let (start, end) = (region.range.gpa(), region.range.end());
        let pieces = &mut tables.kinds[kind(request)];
        pieces.cut(start, end);
        pieces.0.insert(start, Piece { end, rule });
        if tables.len() > MAX_PIECES {
            tables.make_room(request.time());
        }
    }

    fn forget(&self, range: Option<Range>) {
        let mut tables = self.tables.write();
        self.epoch.fetch_add(1, Ordering::SeqCst);
        for pieces in &mut tables.kinds {
            match range {
                Some(range) => pieces.cut(range.gpa(), range.end()),
                None => pieces.0.clear(),
            }
        }
    }
}

impl Tables {
    /// How many pieces there are.
    fn len(&self) -> usize {
        self.kinds.iter().map(|pieces| pieces.0.len()).sum()
    }

    /// Drops the rules that do not hold any more, then the oldest ones until there are at most [`MAX_PIECES`] pieces.
    fn make_room(&mut self, now: u64) {
        self.retain(|rule| rule.holds(now));
        while self.len() > MAX_PIECES {
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
    /// Whether it answers requests that come now.
    fn holds(&self, now: u64) -> bool {
        let in_time = self.until.is_none_or(|until| now < until);
        in_time && self.left.as_ref().is_none_or(|left| left.load(Ordering::Relaxed) > 0)
    }

    /// The decision, if the rule holds. Counts one use.
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
    /// The decision of the rule that has all pages of a request.
    fn find(&self, request: Request<'_>) -> Option<Decision> {
        let range = request.range();
        let (_, piece) = self.0.range(..=range.gpa()).next_back()?;
        (range.end() <= piece.end)
            .then(|| piece.rule.answer(request.time()))
            .flatten()
    }

    /// Removes the pages `[start, end)` from all pieces.
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

/// The decision, so that it can answer every request in the region.
///
/// # Errors
/// If it cannot: the region is not in memory, the decision is of another kind, or it converts other pages than the
/// region's.
fn for_region(request: Request<'_>, decision: &Decision, region: Region) -> Result<Decision, Failure> {
    let Region { range, .. } = region;
    if !request.memory().holds(range) {
        let (gpa, size, memory) = (range.gpa(), range.size(), request.memory().size());
        return Err(format!("Region({gpa:#x}, {size:#x}) does not lie in the guest's {memory:#x} bytes").into());
    }
    match decision {
        Decision::Convert(Convert {
            gpa: None, size: None, ..
        })
        | Decision::Deny(_)
        | Decision::Retry => Ok(decision.clone()),
        // The decision names pages, so every request in the region would convert those: its own must be among them.
        Decision::Convert(convert) => {
            let (target, _) = request.target(convert)?;
            if target.intersect(&range) != Some(range) {
                return Err(format!(
                    "remember: {:#x} to {:#x} would be converted for requests from all of {:#x} to {:#x}, but do not \
                     hold them",
                    target.gpa(),
                    target.end(),
                    range.gpa(),
                    range.end()
                )
                .into());
            }
            Ok(Decision::Convert(Convert {
                gpa: Some(target.gpa()),
                size: Some(target.size()),
                ..*convert
            }))
        }
        Decision::Wait(_) | Decision::Discard | Decision::Stop(_) | Decision::Remember(_) => {
            Err("remember: only Convert, Deny and Retry can be remembered".into())
        }
    }
}
