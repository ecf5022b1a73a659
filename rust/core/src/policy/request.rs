//! Requests, as a policy gets them.

use super::decision::Convert;
use crate::errno::Errno;
use crate::error::{ConvertError, Failure};
use crate::memory::address::{Range, State};
use crate::memory::views::Views;

/// An implicit request: an access to a page in the wrong state. Also what a policy gets
/// for an access to a poisoned page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImplicitRequest {
    /// The vCPU's index.
    pub vcpu: u32,
    /// The page or pages, without the view bit.
    pub range: Range,
    /// The state that the access needs.
    pub access: State,
    /// KVM_MEMORY_EXIT_FLAG_* as KVM reported them; under memslots, where it reports none, as it would have.
    pub flags: u64,
    /// KVM_RUN's errno: EFAULT, or EHWPOISON for poison.
    pub errno: Errno,
    /// The page's state.
    pub state: State,
    /// The guest's instruction pointer: of the instruction that accessed the page, unless `executed`.
    pub rip: u64,
    /// Under memslots, of a store: KVM has executed the instruction, up to the store itself, so that RIP and the other
    /// registers are as it leaves them. Nothing tells where it began: the same store with a prefix and without, for
    /// instance, leaves the same registers.
    pub executed: bool,
    /// How often the same fault came before, with no change of the page in between.
    pub repeats: u32,
    /// When it came: nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Where memory is.
    pub memory: Views,
}

/// An explicit request: KVM_HC_MAP_GPA_RANGE, well-formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExplicitRequest {
    /// The vCPU's index.
    pub vcpu: u32,
    /// The pages, without the view bit.
    pub range: Range,
    /// The state that they are to become.
    pub to: State,
    /// The guest's page-size hint in bytes.
    pub page_size: u64,
    /// The attributes (RDX) as the guest gave them.
    pub raw: u64,
    /// The state of the pages; `None` where it is mixed.
    pub state: Option<State>,
    /// When it came: nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Where memory is.
    pub memory: Views,
}

/// Either kind of request, for policies that treat them alike.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// The guest touched a page in the wrong state.
    Implicit(&'a ImplicitRequest),
    /// The guest asked, by KVM_HC_MAP_GPA_RANGE.
    Explicit(&'a ExplicitRequest),
}

impl Request<'_> {
    /// The pages that were asked for.
    pub fn range(self) -> Range {
        match self {
            Request::Implicit(fault) => fault.range,
            Request::Explicit(call) => call.range,
        }
    }

    /// The state that they are to become.
    pub fn to(self) -> State {
        match self {
            Request::Implicit(fault) => fault.access,
            Request::Explicit(call) => call.to,
        }
    }

    /// Where memory is.
    pub(crate) fn memory(&self) -> &Views {
        match self {
            Request::Implicit(fault) => &fault.memory,
            Request::Explicit(call) => &call.memory,
        }
    }

    /// When it came, in nanoseconds. A policy that measures time uses this one, so that it decides the same when a
    /// trace is replayed.
    pub(crate) fn time(self) -> u64 {
        match self {
            Request::Implicit(fault) => fault.time,
            Request::Explicit(call) => call.time,
        }
    }

    pub(crate) fn vcpu(self) -> u32 {
        match self {
            Request::Implicit(fault) => fault.vcpu,
            Request::Explicit(call) => call.vcpu,
        }
    }

    /// What a decision converts for this request, without being widened.
    ///
    /// # Errors
    /// If that is not a page-aligned part of memory: then it is no decision.
    pub(crate) fn target(self, convert: &Convert) -> Result<(Range, State), Failure> {
        let (asked, to) = (self.range(), convert.to.unwrap_or(self.to()));
        match (convert.gpa, convert.size) {
            (None, None) => Ok((asked, to)),
            (gpa, size) => {
                let range = self.named(gpa, size)?;
                Ok((range, to))
            }
        }
    }

    #[cold]
    fn named(self, given_gpa: Option<u64>, given_size: Option<u64>) -> Result<Range, Failure> {
        let (memory, asked) = (self.memory(), self.range());
        let (gpa, size) = (given_gpa.unwrap_or(asked.gpa()), given_size.unwrap_or(asked.size()));
        let error = ConvertError::Range {
            gpa,
            size,
            memory: memory.size(),
        };
        let range = memory.range(gpa, size);
        range.ok_or_else(|| {
            let default = match (given_gpa, given_size) {
                (Some(_), None) => "; no size is named, so it is the request's",
                (None, Some(_)) => "; no gpa is named, so it is the request's",
                _ => "",
            };
            format!("Convert: {error}{default}").into()
        })
    }

    /// What a decision converts at most: its `range`, widened as far as that can be told without the pages' states.
    pub(crate) fn widened(self, convert: &Convert, range: Range) -> Range {
        match convert.widen {
            None => range,
            Some(block) => self.to_blocks(block, convert.within, range),
        }
    }

    fn to_blocks(self, block: u64, within: Option<Range>, range: Range) -> Range {
        let start = range.gpa() - range.gpa().checked_rem(block).unwrap_or_default();
        let end = range.end().checked_next_multiple_of(block).unwrap_or(range.end());
        let wide = Range::new(start, end - start).unwrap_or(range);
        let limits = self.memory().around(range).into_iter().chain(within);
        limits.fold(wide, |wide, limit| wide.intersect(&limit).unwrap_or(range))
    }
}
