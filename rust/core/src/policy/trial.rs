//! A trial: a policy is asked without a machine, and its decisions are carried out on a page map alone.

use std::sync::Arc;

use parking_lot::Mutex;

use super::decision::{Convert, Decision};
use super::hooks::Policy;
use super::request::{ExplicitRequest, ImplicitRequest, Request};
use crate::errno::{EINVAL, Errno};
use crate::error::{Error, Failure, Site};
use crate::memory::address::{PAGE_SIZE, Range, Run, State};
use crate::memory::page_map::AttributeMap;

/// The most memory of a trial: more than a host maps for one process. Its states take 4 MiB for each TiB.
pub(crate) const MAX_MEMORY: u64 = 16 << 40;

/// What a policy can be asked about.
#[derive(Clone, Copy, Debug)]
pub enum Question {
    /// An implicit request.
    Implicit(ImplicitRequest),
    /// An explicit request.
    Explicit(ExplicitRequest),
    /// A poisoned page.
    Poison(ImplicitRequest),
}

impl Question {
    /// The pages.
    pub fn range(&self) -> Range {
        match self {
            Question::Implicit(fault) | Question::Poison(fault) => fault.range,
            Question::Explicit(call) => call.range,
        }
    }

    fn site(&self) -> Site {
        let (vcpu, state, rip) = match self {
            Question::Implicit(fault) | Question::Poison(fault) => (fault.vcpu, Some(fault.state), fault.rip),
            Question::Explicit(call) => (call.vcpu, call.state, 0),
        };
        Site {
            vcpu,
            gpa: Some(self.range().gpa()),
            state: Some(state.map_or("mixed", State::as_str)),
            rip,
            symbol: None,
        }
    }
}

/// A policy, and the page states that its decisions lead to.
pub struct Trial {
    policy: Arc<dyn Policy>,
    /// Not locked while the policy is asked, because it may read the states.
    model: Mutex<Model>,
}

impl Trial {
    /// A trial of `policy` for `memory` bytes of memory, all of it in state `initial`.
    ///
    /// # Errors
    /// `Invalid` for a size that is no positive multiple of 4096, or above 16 TiB.
    pub fn new(policy: Arc<dyn Policy>, memory: u64, initial: State) -> Result<Self, Error> {
        if Range::new(0, memory).is_none() || memory > MAX_MEMORY {
            return Err(Error::Invalid(format!(
                "memory is {memory:#x}: it must be a positive multiple of {PAGE_SIZE}, at most 16 TiB"
            )));
        }
        Ok(Self::of(policy, Model::new(memory, initial)))
    }

    /// A trial that starts with these states.
    pub(crate) fn of(policy: Arc<dyn Policy>, model: Model) -> Self {
        Self {
            policy,
            model: Mutex::new(model),
        }
    }

    /// Bytes of memory.
    pub fn memory(&self) -> u64 {
        self.model.lock().map.size()
    }

    /// Asks the policy, and carries its decision out on the page map.
    ///
    /// # Errors
    /// `Invalid` for a request outside of memory; `Hook` for a failure of the policy, or a decision that a machine
    /// would not accept.
    pub fn judge(&self, question: &Question) -> Result<Decision, Error> {
        let range = question.range();
        self.range(range.gpa(), range.size())?;
        let carried = self.carry_out(question, true);
        carried.map(|carried| carried.decision).map_err(|failure| Error::Hook {
            site: question.site(),
            failure,
        })
    }

    /// Asks the policy, and carries its decision out if `carry_out`.
    pub(crate) fn carry_out(&self, question: &Question, carry_out: bool) -> Result<Carried, Failure> {
        let request = match question {
            Question::Poison(poison) => return Ok(Carried::nothing(self.poison(poison)?)),
            Question::Implicit(fault) => Request::Implicit(fault),
            Question::Explicit(call) => Request::Explicit(call),
        };
        let decision = self.policy.judge(request)?;
        if !carry_out {
            return Ok(Carried::nothing(decision));
        }
        let carried = self.model.lock().carry_out(request, decision)?;
        if let Some((range, to)) = carried.done
            && (range, to) != (request.range(), request.to())
        {
            self.policy.converted(request, range, to);
        }
        Ok(carried)
    }

    fn poison(&self, poison: &ImplicitRequest) -> Result<Decision, Failure> {
        match self.policy.memory_poison(poison)? {
            Decision::Convert(_) => Err(POISON_IS_NOT_CONVERTED.into()),
            decision => Ok(decision),
        }
    }

    /// Puts a range of memory into a state.
    pub(crate) fn set(&self, range: Range, to: State) {
        self.model.lock().set(range, to);
    }

    /// The state of a range; `None` where it is mixed.
    ///
    /// # Errors
    /// `Invalid` for a range that is not a page-aligned part of memory.
    pub fn state(&self, gpa: u64, size: u64) -> Result<Option<State>, Error> {
        let range = self.range(gpa, size)?;
        Ok(self.model.lock().map.uniform(range))
    }

    /// The states of all memory, as the fewest possible runs, ascending.
    pub fn runs(&self) -> Vec<Run> {
        self.model.lock().map.runs().collect()
    }

    /// Bytes that are shared.
    pub fn shared_bytes(&self) -> u64 {
        self.model.lock().shared_bytes()
    }

    fn range(&self, gpa: u64, size: u64) -> Result<Range, Error> {
        let range = self.model.lock().range(gpa, size);
        range.ok_or_else(|| {
            let memory = self.memory();
            let message = format!("{gpa:#x} + {size:#x} is no page-aligned part of {memory:#x} bytes of memory");
            Error::Invalid(message)
        })
    }
}

/// Page states without memory: decisions are carried out on the page map alone.
pub(crate) struct Model {
    map: AttributeMap,
}

/// A decision, and what it converted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Carried {
    /// The decision. A conversion above its quota has become a Deny.
    pub decision: Decision,
    /// The pages that were converted, and to which state.
    pub done: Option<(Range, State)>,
    /// Bytes whose state changed.
    pub changed: u64,
}

impl Model {
    /// `memory` bytes, a positive multiple of 4096, in state `initial`.
    pub(crate) fn new(memory: u64, initial: State) -> Self {
        Self {
            map: AttributeMap::new(memory, initial),
        }
    }

    /// The states.
    pub(crate) fn map(&self) -> &AttributeMap {
        &self.map
    }

    /// Bytes that are shared.
    pub(crate) fn shared_bytes(&self) -> u64 {
        self.map.size() - self.map.private_bytes()
    }

    /// The range, if it is a page-aligned part of memory.
    pub(crate) fn range(&self, gpa: u64, size: u64) -> Option<Range> {
        Range::new(gpa, size).filter(|range| range.end() <= self.map.size())
    }

    /// Puts a range of memory into a state. Returns the bytes whose state changed.
    pub(crate) fn set(&mut self, range: Range, to: State) -> u64 {
        self.map.set(range, to)
    }

    /// Carries out a decision. Fails where a machine would not accept it.
    fn carry_out(&mut self, request: Request<'_>, decision: Decision) -> Result<Carried, Failure> {
        let convert = match decision {
            Decision::Convert(convert) => convert,
            Decision::Discard => return Err(DISCARD_IS_FOR_POISON.into()),
            Decision::Remember(_) => return Err(NOT_REMEMBERED_HERE.into()),
            decision => return Ok(Carried::nothing(decision)),
        };
        let (least, to) = request.target(&convert)?;
        let wide = request.widened(&convert, least);
        // A range that was widened is not if that takes it above the quota.
        let fits = |range: &Range| !self.above_quota(*range, to, &convert);
        let Some(range) = [wide, least].into_iter().find(fits) else {
            return Ok(Carried::nothing(Decision::Deny(Errno(EINVAL))));
        };
        Ok(Carried {
            changed: self.set(range, to),
            decision: Decision::Convert(match range == least {
                true => convert,
                false => Convert {
                    gpa: Some(range.gpa()),
                    size: Some(range.size()),
                    ..convert
                },
            }),
            done: Some((range, to)),
        })
    }

    fn above_quota(&self, range: Range, to: State, convert: &Convert) -> bool {
        let Some(most) = convert.max_shared.filter(|_| to == State::Shared) else {
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

/// Why Convert is not accepted for poison.
pub(crate) const POISON_IS_NOT_CONVERTED: &str =
    "memory_poison cannot answer Convert: a conversion does not repair a poisoned page";
/// Why Discard is not accepted for a request.
pub(crate) const DISCARD_IS_FOR_POISON: &str = "Discard() is an answer to memory_poison only";
/// Why a decision with a region is not accepted.
pub(crate) const NOT_REMEMBERED_HERE: &str = "a decision can be remembered only by a Remember around its policy";
