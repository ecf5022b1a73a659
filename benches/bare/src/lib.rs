//! What the core is measured against: a plain program around KVM's ioctls, as who has no virtual machine monitor would
//! write it. It runs the same guest code and has the kernel do the same work, and believes whatever the guest asks: no
//! policy, no checks, no undo, no books, no records.
//!
//! With attributes it sets the attribute of what was asked for and discards the stale side; with memslots it swaps
//! slots. Its guest says by port IO where the measured part begins and ends.

mod convert;
mod crew;
mod slots;
mod vcpu;
mod vm;

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub use pagegate_core::Mode;
use pagegate_core::attributes::PAGE_SIZE;
use pagegate_core::views::Views;

use crate::crew::Crew;
use crate::vcpu::BareVcpu;
use crate::vm::BareVm;

/// What the guest writes to the marks' port at the end of the measured part; at its beginning it writes something else.
pub const END: u8 = 2;

/// How often whoever waits looks whether to go on.
const POLL: Duration = Duration::from_millis(25);

/// How much of a conversion is carried out; less than all of it shows what the rest costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The guest is told that it was done.
    Nothing,
    /// KVM enforces the state, and the stale side stays.
    Enforce,
    /// The stale side is discarded, too.
    Discard,
    /// All that pagegate has the kernel do: it looks for what KVM's emulation, which knows no attributes, may have left on
    /// the shared side, too.
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
    /// The address bit that chooses the shared view.
    pub shared_bit: Option<u32>,
    /// The guest asks by doorbell, whose registers the run page then carries.
    pub doorbell: bool,
    /// A page that is touched in the wrong state is converted with its whole block of this many bytes.
    pub block: u64,
    /// The port at which the guest says where it is; read, it answers how often that was.
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
    begin: Instant,
    end: Instant,
    requests: u64,
    port_io: u64,
}

/// Runs the guest until every vCPU halts. `interrupt` is asked now and then whether to give up.
///
/// # Errors
/// The kernel's; `TimedOut` after `timeout`; `Interrupted` where `interrupt` said so; `InvalidData` for a guest that does
/// something else than this program knows, or leaves out a mark.
pub fn run(plan: &Plan, timeout: Option<Duration>, interrupt: &mut dyn FnMut() -> bool) -> io::Result<Measured> {
    let vm = BareVm::new(plan)?;
    let starts = plan.vcpus.iter().enumerate();
    let vcpus = starts.map(|(index, start)| BareVcpu::new(&vm, index, start));
    let vcpus = vcpus.collect::<io::Result<Vec<_>>>()?;
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let crew = Crew::new(vcpus.len())?;
    let (spans, given_up) = std::thread::scope(|scope| {
        let crew = &crew;
        let body = |mut vcpu: BareVcpu<'_>| {
            let _aboard = crew.board();
            vcpu.run(&crew.leave)
        };
        let threads: Vec<_> = vcpus.into_iter().map(|vcpu| scope.spawn(move || body(vcpu))).collect();
        let mut given_up = None;
        while !crew.wait(POLL) {
            if given_up.is_none() {
                let late = deadline.is_some_and(|deadline| deadline <= Instant::now());
                given_up = late.then_some(io::ErrorKind::TimedOut);
                given_up = given_up.or_else(|| interrupt().then_some(io::ErrorKind::Interrupted));
            }
            if given_up.is_some() {
                crew.leave.store(true, Ordering::SeqCst);
            }
            if crew.leave.load(Ordering::SeqCst) {
                crew.kick();
            }
        }
        // All are joined, whatever the first of them says.
        let ends: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        (ends, given_up)
    });
    // One that failed had the others leave, so that its error counts.
    let mut measured = Vec::new();
    for span in spans {
        match span {
            Ok(span) => measured.extend(span?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    if let Some(kind) = given_up {
        return Err(kind.into());
    }
    sum(&measured, plan.vcpus.len()).ok_or_else(|| {
        let text = "the guest did not say where the measured part begins and ends";
        io::Error::new(io::ErrorKind::InvalidData, text)
    })
}

fn sum(spans: &[Span], vcpus: usize) -> Option<Measured> {
    let begin = spans.iter().map(|span| span.begin).min()?;
    let end = spans.iter().map(|span| span.end).max()?;
    (spans.len() == vcpus).then(|| Measured {
        time: end.saturating_duration_since(begin),
        requests: spans.iter().map(|span| span.requests).sum(),
        port_io: spans.iter().map(|span| span.port_io).sum(),
    })
}

/// Where the guest's memory appears.
pub(crate) fn views(plan: &Plan) -> Views {
    Views::new(plan.memory, plan.shared_bit)
}
