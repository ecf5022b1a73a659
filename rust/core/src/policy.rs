//! Who decides, about what, and how.

use std::time::Duration;

use crate::attributes::{Range, State};
use crate::errno::Errno;
use crate::error::Failure;

/// An implicit request: an access met a page that is not in the accessed state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The vCPU's index.
    pub vcpu: u32,
    /// The page or pages, shared bit stripped.
    pub range: Range,
    /// The side that was accessed.
    pub access: State,
    /// KVM_MEMORY_EXIT_FLAG_* as KVM reported them, or as it would have.
    pub flags: u64,
    /// EFAULT; for poison EHWPOISON.
    pub errno: Errno,
    /// The page's state.
    pub state: State,
    /// The guest's instruction pointer.
    pub rip: u64,
    /// How often this very fault came before, with no change of the page in between.
    pub repeats: u32,
    /// When it came: nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Bytes of guest memory.
    pub memory: u64,
}

/// An explicit request: KVM_HC_MAP_GPA_RANGE, well-formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The vCPU's index.
    pub vcpu: u32,
    /// The pages, shared bit stripped.
    pub range: Range,
    /// What the guest wants them to be.
    pub to: State,
    /// The guest's page-size hint in bytes.
    pub page_size: u64,
    /// The attribute word as the guest gave it.
    pub raw: u64,
    /// The present state; `None` where it is mixed.
    pub state: Option<State>,
    /// When it came: nanoseconds of CLOCK_MONOTONIC.
    pub time: u64,
    /// Bytes of guest memory.
    pub memory: u64,
}

/// A decision to convert, where it differs from what was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conversion {
    /// The state to convert to.
    pub to: Option<State>,
    /// The start of the range, page-aligned.
    pub gpa: Option<u64>,
    /// The size of the range in bytes, page-aligned.
    pub size: Option<u64>,
    /// Have KVM map the pages before the guest touches them (KVM_PRE_FAULT_MEMORY), where the host can.
    pub prefault: bool,
    /// Do not free the stale side: its bytes come back when the page does, and until then memory is held twice.
    pub keep: bool,
    /// Refuse if more bytes than this would be shared then.
    pub max_shared: Option<u64>,
}

/// What to do about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Convert: as asked, or other pages, or to the other state.
    Convert(Conversion),
    /// Refuse. Explicit: the guest finds the errno in RAX. Implicit: the run ends as "denied".
    Deny(Errno),
    /// Let the guest try again. Explicit: it finds EAGAIN.
    Retry,
    /// Let the guest try again, but not before this time has passed. Explicit: as Retry.
    Wait(Duration),
    /// Free the poisoned page, and let the guest go on: it reads zeroes. An answer to poison only.
    Discard,
    /// End the run with this reason.
    Stop(String),
}

impl Decision {
    /// Convert as asked.
    pub const fn as_asked() -> Self {
        Decision::Convert(Conversion {
            to: None,
            gpa: None,
            size: None,
            prefault: false,
            keep: false,
            max_shared: None,
        })
    }
}

/// Judges requests. Called on vCPU threads, several at once.
///
/// Each default is the one of a policy that says nothing: convert as asked, stop at poison.
pub trait Policy: Send + Sync {
    /// Judges an implicit request.
    ///
    /// # Errors
    /// A failure ends the run; nothing is converted.
    fn memory_fault(&self, fault: &Fault) -> Result<Decision, Failure> {
        let _ = fault;
        Ok(Decision::as_asked())
    }

    /// Judges an explicit request.
    ///
    /// # Errors
    /// As above.
    fn map_gpa_range(&self, call: &Call) -> Result<Decision, Failure> {
        let _ = call;
        Ok(Decision::as_asked())
    }

    /// Is told of a poisoned page, and decides how to go on.
    ///
    /// # Errors
    /// As above.
    fn memory_poison(&self, poison: &Fault) -> Result<Decision, Failure> {
        let _ = poison;
        Ok(Decision::Stop("poison".to_owned()))
    }
}

/// Converts whatever is asked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allow;

impl Policy for Allow {}
