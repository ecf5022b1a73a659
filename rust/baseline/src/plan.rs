//! What is run, and what was measured.

use std::time::{Duration, Instant};

use crate::pages::PAGE_SIZE;

/// What the guest writes to the marks' port at the end of the measured part. Any other value is its beginning.
pub const END: u8 = 2;

/// How a page's state is enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By memory attributes, on a VM with private memory.
    Attributes,
    /// By memslots, on any VM.
    Memslots,
}

/// How much of a conversion is carried out. What a step costs is the difference between two of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing; the guest is answered as if it were done.
    Nothing,
    /// KVM enforces the state, and the old side's bytes stay.
    Enforce,
    /// The old side is discarded, too.
    Discard,
    /// All that pagegate has the kernel do: before a page becomes shared, `lseek` finds what KVM's emulation, which does not
    /// heed attributes, wrote to its shared side, and that is discarded, too.
    All,
}

/// What one vCPU executes, in long mode.
#[derive(Clone, Debug)]
pub struct Start {
    /// Where the image is loaded and entered.
    pub at: u64,
    /// Code and data, position-independent.
    pub image: Vec<u8>,
    /// RDI at the entry, without the shared bit.
    pub argument: u64,
}

/// A machine and what it does. All of its memory is shared at first.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Bytes of guest memory.
    pub memory: u64,
    /// Memory is divided into this many equal parts, and no memslot crosses from one to the next.
    pub memslots: u64,
    /// How a page's state is enforced.
    pub mode: Mode,
    /// The address bit that means the shared view of a page.
    pub shared_bit: Option<u32>,
    /// The guest asks by doorbell, so KVM is to copy its registers to kvm_run at each exit.
    pub doorbell: bool,
    /// A page that is touched in the wrong state is converted with its whole block of this many bytes.
    pub block: u64,
    /// The port of the guest's marks. A read of it is answered with how many there were so far.
    pub marks: u16,
    /// One for each vCPU.
    pub vcpus: Vec<Start>,
    /// What is done of each conversion.
    pub work: Work,
}

impl Plan {
    /// Whether it can be run at all.
    pub fn is_sound(&self) -> bool {
        let part = self.memory.checked_div(self.memslots).unwrap_or_default();
        let whole = part > 0 && part.is_multiple_of(PAGE_SIZE) && part * self.memslots == self.memory;
        let fits =
            |start: &Start| (start.at.checked_add(start.image.len() as u64)).is_some_and(|end| end <= self.memory);
        let bit = self.shared_bit.is_none_or(|bit| bit < 52 && self.memory <= 1 << bit);
        let block = self.block >= PAGE_SIZE && self.block.is_power_of_two();
        whole && bit && block && self.vcpus.iter().all(fits) && !self.vcpus.is_empty()
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// From the first vCPU's beginning to the last one's end.
    pub time: Duration,
    /// Requests in between.
    pub requests: u64,
    /// Exits for port IO in between.
    pub port_io: u64,
}

/// One vCPU's marks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub begin: Instant,
    pub end: Instant,
    pub requests: u64,
    pub port_io: u64,
}
