//! The plan of a run, and the result of the measurement.

use std::time::{Duration, Instant};

use crate::pages::PAGE_SIZE;

/// The value that the guest writes to port `marks` at the end of the measured part. Any other marks its beginning.
pub const END: u8 = 2;

/// How KVM is made to enforce the states of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By KVM_SET_MEMORY_ATTRIBUTES, on a VM with private memory.
    Attributes,
    /// By KVM_SET_MEMORY_ATTRIBUTES on the view that a page is not in, on such a VM with a memslot for each view and no
    /// guest_memfd. It needs a shared bit.
    Traps,
    /// By replacing memslots, on an ordinary VM.
    Memslots,
}

/// The steps of a conversion that are carried out. The difference between two of these is the cost of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// None: the guest only gets its answer.
    Nothing,
    /// KVM is made to enforce the state; the old side keeps its bytes.
    Enforce,
    /// Also, the old side is discarded.
    Discard,
    /// All system calls of pagegate. With attributes, before a page becomes shared, `lseek` finds what KVM's emulation,
    /// which does not check attributes, wrote to its shared side, and that is discarded, too. With traps the same is
    /// done on either side, before a page comes to it.
    All,
}

/// What one vCPU executes, in long mode.
#[derive(Clone, Debug)]
pub struct Start {
    /// The gpa that the image is loaded and entered at.
    pub at: u64,
    /// Position-independent code, and data.
    pub image: Vec<u8>,
    /// A gpa, without the shared bit. RDI at the entry is its address in the shared view.
    pub argument: u64,
}

/// The machine, its guest, and the work to do. All of its memory is shared at first.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Bytes of guest memory.
    pub memory: u64,
    /// Memory is divided into this many equal parts, and no memslot crosses from one to the next.
    pub memslots: u64,
    /// How KVM is made to enforce the states of pages.
    pub mode: Mode,
    /// The bit of a guest-physical address that means the shared view.
    pub shared_bit: Option<u32>,
    /// Whether the guest uses the doorbell, for which KVM has to copy its registers to kvm_run at each exit.
    pub doorbell: bool,
    /// Implicit requests convert whole blocks of this many bytes.
    pub block: u64,
    /// The port of the guest's marks. An IN from it reads the number of marks so far.
    pub marks: u16,
    /// What each vCPU executes.
    pub vcpus: Vec<Start>,
    /// The steps of each conversion.
    pub work: Work,
    /// The command of a process that has the bytes of memory, which is missing at first. Empty: it is there, of zeroes.
    pub pager: Vec<String>,
}

impl Plan {
    /// Whether its values are in range and fit each other.
    pub fn is_sound(&self) -> bool {
        let part = self.memory.checked_div(self.memslots).unwrap_or_default();
        let whole = part > 0 && part.is_multiple_of(PAGE_SIZE) && part * self.memslots == self.memory;
        let fits =
            |start: &Start| (start.at.checked_add(start.image.len() as u64)).is_some_and(|end| end <= self.memory);
        let bit = self.shared_bit.is_none_or(|bit| bit < 52 && self.memory <= 1 << bit);
        let views = self.mode != Mode::Traps || self.shared_bit.is_some();
        let block = self.block >= PAGE_SIZE && self.block.is_power_of_two();
        whole && bit && views && block && self.vcpus.iter().all(fits) && !self.vcpus.is_empty()
    }
}

/// The result of a measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// From the first mark of a beginning to the last mark of an end, over all vCPUs.
    pub time: Duration,
    /// Requests between each vCPU's own marks.
    pub requests: u64,
    /// Port IO exits between each vCPU's own marks.
    pub port_io: u64,
}

/// The part between one vCPU's marks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub begin: Instant,
    pub end: Instant,
    pub requests: u64,
    pub port_io: u64,
}
