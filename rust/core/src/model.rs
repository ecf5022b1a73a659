//! What decisions would do, without a machine: they are carried out on a map of states.

use crate::attributes::{AttributeMap, Range, State};
use crate::errno::{EINVAL, Errno};
use crate::error::Failure;
use crate::policies::Request;
use crate::policy::{Conversion, Decision, Fault, Policy};

/// A machine's states, and what changes them.
pub struct Model {
    map: AttributeMap,
}

/// A decision that was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    /// The decision; a conversion above its quota is a refusal.
    pub decision: Decision,
    /// What was converted, and to what.
    pub done: Option<(Range, State)>,
    /// Bytes whose state changed.
    pub changed: u64,
}

impl Model {
    /// All of memory, whose size is as [`AttributeMap::new`] takes it, in state `initial`.
    pub fn new(memory: u64, initial: State) -> Self {
        Self {
            map: AttributeMap::new(memory, initial),
        }
    }

    /// The states.
    pub fn map(&self) -> &AttributeMap {
        &self.map
    }

    /// Bytes that are shared.
    pub fn shared_bytes(&self) -> u64 {
        self.map.size() - self.map.private_bytes()
    }

    /// The range, if it lies in memory.
    pub fn range(&self, gpa: u64, size: u64) -> Option<Range> {
        Range::new(gpa, size).filter(|range| range.end() <= self.map.size())
    }

    /// Puts a range that lies in memory into a state: bytes whose state changed.
    pub fn set(&mut self, range: Range, to: State) -> u64 {
        self.map.set(range, to)
    }

    /// Carries out a decision on a request for pages.
    ///
    /// # Errors
    /// What a machine says to a decision that cannot be carried out.
    pub fn carry_out(&mut self, request: Request<'_>, decision: Decision) -> Result<Carried, Failure> {
        let conversion = match decision {
            Decision::Convert(conversion) => conversion,
            Decision::Discard => return Err("Discard() is an answer to memory_poison only".into()),
            decision => return Ok(Carried::nothing(decision)),
        };
        let (start, end, to) = request.target(&conversion);
        let size = end - start;
        let range = self.range(start, size).ok_or_else(|| {
            let memory = self.map.size();
            format!("Convert: {start:#x} + {size:#x} is no page-aligned part of {memory:#x} bytes of memory")
        })?;
        if self.above_quota(range, to, &conversion) {
            return Ok(Carried::nothing(Decision::Deny(Errno(EINVAL))));
        }
        Ok(Carried {
            changed: self.set(range, to),
            decision: Decision::Convert(conversion),
            done: Some((range, to)),
        })
    }

    fn above_quota(&self, range: Range, to: State, conversion: &Conversion) -> bool {
        let Some(most) = conversion.max_shared.filter(|_| to == State::Shared) else {
            return false;
        };
        let private = self.map.runs_in(range).filter(|run| run.state == State::Private);
        self.shared_bytes() + private.map(|run| run.range.size()).sum::<u64>() > most
    }
}

impl Carried {
    /// A decision that converts nothing.
    pub(crate) fn nothing(decision: Decision) -> Self {
        Self {
            decision,
            done: None,
            changed: 0,
        }
    }
}

/// What a policy says to a poisoned page.
///
/// # Errors
/// Its own, and for an answer that is none.
pub fn poison(policy: &dyn Policy, poison: &Fault) -> Result<Decision, Failure> {
    match policy.memory_poison(poison)? {
        Decision::Convert(_) => Err(POISON_IS_NOT_CONVERTED.into()),
        decision => Ok(decision),
    }
}

/// Why Convert is no answer to poison.
pub(crate) const POISON_IS_NOT_CONVERTED: &str =
    "memory_poison cannot answer Convert: a conversion does not repair a poisoned page";
