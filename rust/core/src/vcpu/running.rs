//! A vCPU's data during a run: the parts of the machine that it needs, its open request, and its counts.

use std::sync::atomic::AtomicU8;
use std::time::Duration;

use kvm_bindings::KVM_MP_STATE_UNINITIALIZED;

use super::asker::{Whereabouts, asker, linear};
use super::control::Control;
use super::kick::{Kick, kicked};
use super::state::VcpuState;
use super::tally::Tally;
use crate::clock::monotonic;
use crate::devices::bus::{Bus, KnownPort};
use crate::errno::Errno;
use crate::error::{Error, Executing, Failure, Site};
use crate::events::event::{Asked, Done, Event, Outcome, RecordedDecision};
use crate::events::log::EventLog;
use crate::hypervisor::exit::{Exit, Mmio};
use crate::memory::address::{Range, State};
use crate::memory::guest_memory::{Entry, GuestMemory};
use crate::policy::current::{CurrentPolicy, KnownPolicy};
use crate::x86::sev::SoftwareSev;

/// Identical faults in a row, without a change of the page in between, that count as a livelock.
pub const LIVELOCK_BOUND: u32 = 1000;
/// Repeats without a wait in between; later ones wait longer each time.
const EAGER_REPEATS: u32 = 16;
pub(super) const LONGEST_WAIT: Duration = Duration::from_millis(1);

/// The parts of a machine that its vCPUs' loops need.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub memory: &'a GuestMemory,
    pub bus: &'a Bus,
    pub policy: &'a CurrentPolicy,
    pub events: &'a EventLog,
    pub control: &'a Control,
    /// Whether KVM has KVM_PRE_FAULT_MEMORY.
    pub pre_fault: bool,
    /// The profile of a software SEV guest.
    pub sev: Option<SoftwareSev>,
    /// The machine is a PC: a halted vCPU sleeps in the kernel without an exit, and explicit requests are logged with
    /// their RIP, too.
    pub is_pc: bool,
}

/// What to do after an exit was handled.
pub(crate) enum Flow {
    /// Enter the guest.
    Resume,
    /// End the run with this reason; the exit, if any, is answered first in the next run.
    Leave(String, Option<Exit>),
    /// The run is ending; this exit is answered first in the next run.
    Postpone(Exit),
    /// This vCPU executed HLT.
    Halt,
    /// This vCPU triple-faulted.
    Shutdown,
}

/// How often the same fault came in a row.
#[derive(Default)]
pub(crate) struct Repeats {
    last: Option<(u64, State)>,
    /// The page's count of changes at the last fault.
    changes: u64,
    count: u32,
}

/// One vCPU, in its thread, for one run.
pub(crate) struct RunningVcpu<'a> {
    pub context: Context<'a>,
    pub state: &'a mut VcpuState,
    pub kick: &'a Kick,
    immediate_exit: &'a AtomicU8,
    /// What it had seen when it last entered the guest.
    pub entry: Entry,
    repeats: Repeats,
    /// What the instruction read that was taken back last.
    pub(super) taken_back: Option<Mmio>,
    pub policy: KnownPolicy,
    pub port: KnownPort,
    pub tally: &'a mut Tally,
    /// The time of the exit that is being handled, in nanoseconds of CLOCK_MONOTONIC; set only if it can be a request.
    pub exited: u64,
    /// The time of the open request's exit.
    since: u64,
}

impl<'a> RunningVcpu<'a> {
    pub(crate) fn new(context: Context<'a>, state: &'a mut VcpuState, kick: &'a Kick, tally: &'a mut Tally) -> Self {
        state.log.forget();
        Self {
            context,
            state,
            kick,
            immediate_exit: kick.immediate_exit(),
            entry: context.memory.entry(),
            repeats: Repeats::default(),
            taken_back: None,
            policy: context.policy.known(),
            port: KnownPort::default(),
            tally,
            exited: 0,
            since: 0,
        }
    }

    /// Whether the run ends. Ending a run kicks all vCPUs, so it is enough to look at immediate_exit first.
    #[inline]
    pub(crate) fn must_leave(&self) -> bool {
        kicked(self.immediate_exit) && self.context.control.leaving()
    }

    /// Notes whether pages are open for this vCPU because it has no paging. If so, it is kicked from time to time.
    pub(super) fn set_unpaged(&mut self, unpaged: bool) {
        self.state.unpaged = unpaged;
        self.kick.set_nudged(unpaged);
    }

    pub(crate) fn rip(&mut self) -> u64 {
        self.state.rip()
    }

    /// The linear address of the instruction.
    pub(crate) fn linear_rip(&mut self) -> Option<u64> {
        Some(linear(&self.state.regs().ok()?, &self.state.hv.sregs().ok()?))
    }

    /// Where it is, for the report or an error.
    pub(crate) fn whereabouts(&self) -> Option<Whereabouts> {
        asker()?.whereabouts(self.state.index)
    }

    /// Whether it has never been started by another vCPU of a PC.
    pub(crate) fn waits_for_init(&self) -> bool {
        let state = self.state.hv.mp_state();
        self.context.is_pc && state.is_ok_and(|state| state.mp_state == KVM_MP_STATE_UNINITIALIZED)
    }

    // ---- the record of a request

    /// Notes the exit's time. Called for exits that can be a request.
    #[inline]
    pub(crate) fn note_time(&mut self) {
        self.exited = monotonic();
    }

    #[inline]
    pub(crate) fn open_request(&mut self, asked: &Asked) {
        self.close_request();
        self.since = self.exited;
        self.state.log.begin(asked);
    }

    /// Logs the outcome of an open request that converted nothing.
    pub(crate) fn close_as(&mut self, outcome: Outcome, errno: i32) {
        self.state.log.ended_with_nothing(outcome, errno);
    }

    /// Publishes the open request, if any: the guest resumes, or the run ends.
    #[inline]
    pub(crate) fn close_request(&mut self) {
        if self.state.log.is_open() {
            self.publish();
        }
    }

    fn publish(&mut self) {
        let latency = monotonic().saturating_sub(self.since);
        self.tally.latency.record(latency);
        self.context.events.publish(&mut self.state.log, latency);
    }

    /// Logs what no policy was asked about. It is no request: its time counts for nothing.
    pub(super) fn record_other(&mut self, asked: &Asked, outcome: Outcome, errno: i32) {
        self.close_request();
        let log = &mut self.state.log;
        log.begin(asked);
        log.decided(&RecordedDecision::none(asked.to));
        log.ended(outcome, errno, &Done::nothing(asked.gpa, asked.to));
        self.context.events.publish(log, 0);
    }

    // ---- trying again

    /// How often the same fault came before this one in a row, without a change of its page.
    pub(crate) fn repeats(&mut self, page: Range, access: State, changes: u64) -> u32 {
        let key = Some((page.gpa(), access));
        let repeats = &mut self.repeats;
        if repeats.last == key && repeats.changes == changes {
            repeats.count = repeats.count.saturating_add(1);
        } else {
            *repeats = Repeats {
                last: key,
                changes,
                count: 0,
            };
        }
        repeats.count
    }

    /// Waits up to a millisecond, after more than a few repeats.
    pub(crate) fn back_off(&self, repeats: u32) {
        if let Some(waits) = repeats.checked_sub(EAGER_REPEATS) {
            let wait = (Duration::from_micros(10) * waits).min(LONGEST_WAIT);
            self.context.control.pause(wait);
        }
    }

    // ---- errors

    pub(crate) fn site(&mut self, pages: Option<Range>) -> Site {
        Site {
            vcpu: self.state.index,
            gpa: pages.map(|range| range.gpa()),
            state: pages.map(|range| self.context.memory.describe(range)),
            rip: self.rip(),
            symbol: None,
        }
    }

    /// An exit after which the run cannot go on.
    pub(crate) fn failed(&mut self, what: String) -> Error {
        let site = self.site(None);
        Error::Exit { site, what }
    }

    pub(crate) fn no_registers(&mut self, errno: Errno) -> Error {
        self.failed(format!("the registers cannot be reached: {errno}"))
    }

    pub(crate) fn livelock(&mut self, page: Range, access: State, repeats: u32) -> Error {
        let events = self.context.events.about(page.gpa(), 8);
        let line = |event: &Event| {
            let (kind, to, outcome) = (event.kind.as_str(), event.to, event.outcome.as_str());
            format!(
                "\n  event {}: vCPU {} {kind} to {to}: {outcome}",
                event.sequence, event.vcpu
            )
        };
        let lines: String = events.iter().map(line).collect();
        let at = self.whereabouts();
        Error::Livelock {
            site: self.site(Some(page)),
            executing: Box::new(Executing {
                cr2: at.as_ref().map(|at| at.cr2),
                instruction: at.and_then(|at| at.instruction),
            }),
            access: access.as_str(),
            repeats,
            history: match lines.is_empty() {
                true => "; no earlier request was about this page".into(),
                false => format!("; the last requests about this page:{lines}").into(),
            },
        }
    }
}

pub(crate) fn hook_failed(site: Site, failure: Failure) -> Error {
    Error::Hook { site, failure }
}
