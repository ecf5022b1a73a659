//! The way of a request: exit, decode, policy, convert, record, resume.

use std::sync::atomic::AtomicU8;
use std::time::Duration;

use crate::attributes::{PAGE_SIZE, Range, State};
use crate::clock::{Mark, Moment, Stopwatch};
use crate::control::Control;
use crate::convert::{Converted, Entry, Order, Standing, Wanted};
use crate::decode::{self, Exit, Hypercall, Io, MemoryFault, Mmio};
use crate::devices::KnownPort;
use crate::enforce::Mode;
use crate::errno::Errno;
use crate::error::{ConvertError, Error, Failure, Site};
use crate::events::{Answer, Asked, Done, Event, Kind, Outcome};
use crate::explicit::{self, DOORBELL_PORT, KVM_ENOSYS, KVM_HC_MAP_GPA_RANGE};
use crate::kick::{self, Kick};
use crate::ledger::Look;
use crate::machine::{KnownPolicy, Machine};
use crate::model;
use crate::policy::{Call, Conversion, Decision, Fault};
use crate::report::Tally;
use crate::vcpu::VcpuState;
use crate::views::Place;
use crate::world::World;

/// The only flag of KVM_EXIT_MEMORY_FAULT.
pub const MEMORY_EXIT_FLAG_PRIVATE: u64 = 1 << 3;
/// Identical faults, with no change in between, after which a vCPU is not getting anywhere.
pub const LIVELOCK_BOUND: u32 = 1000;
/// An explicit request is put to the policy this often again, if its pages change each time while the policy judges.
const ASKED_AGAIN_BOUND: u32 = 16;
/// EAGAIN or ENOMEM in a row, from KVM_RUN itself, after which it will not get better.
const KVM_RUN_BOUND: u32 = 1000;
/// Repeats before a vCPU that tries again begins to wait in between.
const EAGER_REPEATS: u32 = 16;
/// One KVM_PRE_FAULT_MEMORY call is for at most this many bytes, so that a run that ends does not wait for it.
const PREFAULT_CHUNK: u64 = 2 << 20;
const LONGEST_WAIT: Duration = Duration::from_millis(1);
/// Bytes of the longest instruction of the architecture.
const LONGEST_INSTRUCTION: u64 = 15;
const KVM_INTERNAL_ERROR_EMULATION: u32 = 1;

/// What to do after an exit was handled.
enum Flow {
    /// Enter the guest.
    Resume,
    /// Look at this exit again, which cannot be had from the guest a second time.
    Again(Exit),
    /// End the run with this reason; the exit, if any, is still to be answered when it goes on.
    Leave(String, Option<Exit>),
    /// This vCPU is at rest.
    Halt,
    /// This vCPU cannot go on.
    Shutdown,
}

/// What came of an implicit request.
enum Judged {
    /// Nothing more to decide: look at the page again.
    Look,
    /// The run ends.
    Leave(String),
}

/// How often a fault came in a row.
#[derive(Default)]
struct Repeats {
    last: Option<(u64, State)>,
    /// How often the page had changed by then.
    changes: u64,
    count: u32,
}

/// One vCPU, in its thread, for one run.
pub(crate) struct VcpuLoop<'a> {
    machine: &'a Machine,
    control: &'a Control,
    vcpu: &'a mut VcpuState,
    kick: &'a Kick,
    immediate_exit: &'a AtomicU8,
    /// Where the vCPU waits while slots change, if it has to.
    world: Option<&'a World>,
    entry: Entry,
    repeats: Repeats,
    refused: u32,
    /// How often the explicit request that is being answered was put to the policy anew.
    asked_again: u32,
    watch: Stopwatch,
    /// When the exit that is being handled was seen, for those that can be requests.
    exited: Moment,
    /// The same, to measure from.
    exit_mark: Mark,
    /// The same of the request that is being answered.
    since: Mark,
    known_port: KnownPort,
    policy: KnownPolicy,
    tally: Tally,
}

impl<'a> VcpuLoop<'a> {
    pub(crate) fn new(machine: &'a Machine, control: &'a Control, vcpu: &'a mut VcpuState) -> Self {
        vcpu.log.forget();
        let (watch, now) = (machine.stopwatch(), Moment::now());
        Self {
            machine,
            control,
            kick: machine.kick(vcpu.index),
            immediate_exit: machine.kick(vcpu.index).flag(),
            world: machine.gate().enforcement().world(),
            vcpu,
            entry: machine.gate().entry(),
            repeats: Repeats::default(),
            refused: 0,
            asked_again: 0,
            watch,
            exited: now,
            exit_mark: watch.mark(now),
            since: watch.mark(now),
            known_port: KnownPort::default(),
            policy: machine.known_policy(),
            tally: Tally::default(),
        }
    }

    /// Runs until the vCPU or the run ends.
    pub(crate) fn run(mut self) -> Tally {
        while let Some(exit) = self.next_exit() {
            let handled = self.handle(exit);
            if !self.goes_on(exit, handled) {
                break;
            }
        }
        if self.vcpu.log.is_open() {
            self.close_request();
        }
        self.vcpu.settle(self.kick, self.world);
        self.tally
    }

    /// Whether this vCPU does, after an exit was handled.
    fn goes_on(&mut self, exit: Exit, handled: Result<Flow, Error>) -> bool {
        if handled.is_err() && exit.awaits_reply() {
            // Nobody answered it, so it is the first thing to do should the run go on.
            self.vcpu.pending = Some(exit);
            self.vcpu.reply_due = false;
        }
        match handled {
            Ok(Flow::Resume) => {}
            Ok(Flow::Again(exit)) => self.vcpu.pending = Some(exit),
            Ok(Flow::Leave(reason, pending)) => {
                self.vcpu.pending = pending;
                self.control.finish(Ok(reason));
            }
            Ok(Flow::Halt) => {
                self.control.halted();
                return false;
            }
            Ok(Flow::Shutdown) => {
                self.vcpu.started = false;
                self.control.stop("shutdown");
            }
            Err(error) => self.control.finish(Err(error)),
        }
        true
    }

    /// Resume, and the next exit that is not answered by the way; `None` when the run ends.
    ///
    /// Explicit requests, and port IO to the handler that this vCPU used last, are answered here and take the shortest way
    /// there is: they are by far the most frequent exits. What they go through is inlined into this function, down to the
    /// map: a fifth of a request's instructions were the calls in between.
    #[inline(never)]
    fn next_exit(&mut self) -> Option<Exit> {
        let (machine, kick, vcpu) = (self.machine, self.kick, self.vcpu.index);
        'entries: loop {
            if self.must_leave() {
                return None;
            }
            if self.vcpu.pending.is_some() {
                return self.vcpu.pending.take();
            }
            if self.vcpu.log.is_open() {
                self.close_request();
            }
            machine.gate().enter_again(&mut self.entry);
            let call = loop {
                let (result, page) = match self.world {
                    None => self.vcpu.run(kick),
                    Some(world) => {
                        let _inside = world.enter();
                        self.vcpu.run(kick)
                    }
                };
                if result.is_ok()
                    && let Some(head) = decode::port_io(page)
                {
                    let io = decode::io(head);
                    if let Some(handler) = machine.devices().known(io.port, &self.known_port)
                        && let Some(data) = decode::io_data(page, &io)
                    {
                        let answered = handler.io(vcpu, &io, data);
                        self.refused = 0;
                        if let Err(failure) = answered {
                            self.unanswered(io, failure);
                            continue 'entries;
                        }
                        self.vcpu.reply_due = true;
                        if self.must_leave() {
                            return None;
                        }
                        // Nothing was pending, no request was opened, and this vCPU saw no page: all else that is looked at
                        // before an entry is as it was.
                        machine.gate().enter_with_slots(&mut self.entry);
                        continue;
                    }
                }
                match decode::hypercall(page).filter(|_| result.is_ok()) {
                    Some(call) => break call,
                    None => return Some(decode::decode(result, page)),
                }
            };
            self.refused = 0;
            if let Err(error) = self.hypercall(call) {
                self.goes_on(Exit::Hypercall(call), Err(error));
            }
        }
    }

    /// Whether the run ends. Whoever has a reason for that kicks.
    #[inline(always)]
    fn must_leave(&self) -> bool {
        kick::kicked(self.immediate_exit) && self.control.leaving()
    }

    /// A handler failed: the run ends, and its exit is the first thing to do should it go on.
    #[cold]
    fn unanswered(&mut self, io: Io, failure: Failure) {
        self.vcpu.pending = Some(Exit::Io(io));
        let site = self.site(None);
        self.control.finish(Err(self.hook(&site, failure)));
    }

    fn handle(&mut self, exit: Exit) -> Result<Flow, Error> {
        if !matches!(exit, Exit::TryAgain | Exit::OutOfMemory) {
            self.refused = 0;
        }
        match exit {
            Exit::Interrupted | Exit::SetTpr => Ok(Flow::Resume),
            Exit::TryAgain => self.refused(Errno(libc::EAGAIN)),
            Exit::OutOfMemory => self.refused(Errno(libc::ENOMEM)),
            Exit::MemoryFault(fault) => self.memory_fault(fault),
            Exit::Poison(fault) => self.poison(fault),
            Exit::BadBacking => Err(self.bad_backing()),
            Exit::Failed(errno) => Err(self.failed(format!("KVM_RUN failed with {errno}"))),
            Exit::Io(io) if io.port == DOORBELL_PORT && io.write && io.len() == 1 => {
                self.doorbell().map(|()| Flow::Resume)
            }
            Exit::Io(io) => self.io(io),
            Exit::Mmio(mmio) => self.mmio(mmio),
            Exit::Hypercall(call) => self.hypercall_left_over(call),
            Exit::Halt => Ok(Flow::Halt),
            Exit::Shutdown => Ok(Flow::Shutdown),
            Exit::InternalError { suberror } => self.internal_error(suberror),
            Exit::FailEntry { reason } => Err(self.failed(format!(
                "the CPU refused to enter the guest, hardware reason {reason:#x}"
            ))),
            Exit::SystemEvent { kind } => Err(self.failed(format!("KVM reported system event {kind}"))),
            Exit::Unknown {
                reason: decode::SENTINEL,
            } => Err(self.failed("KVM_RUN returned without an exit reason".to_owned())),
            Exit::Unknown { reason } => Err(self.failed(format!("exit reason {reason} is not one this core handles"))),
        }
    }

    // ---- implicit requests

    fn memory_fault(&mut self, fault: MemoryFault) -> Result<Flow, Error> {
        self.seen_now();
        let (page, access) = self.faulted(&fault)?;
        match self.judge(page, access, fault.flags)? {
            Judged::Look => Ok(Flow::Resume),
            Judged::Leave(reason) => Ok(Flow::Leave(reason, None)),
        }
    }

    /// An access to an address without a slot. In memory, under a shared bit, it touched the view that its page is
    /// not in; there KVM cannot execute it again, so it is completed here once the page is.
    fn mmio(&mut self, mmio: Mmio) -> Result<Flow, Error> {
        let Some((place, page)) = self.machine.gate().views().locate(mmio.gpa).and_then(|place| {
            let page = self.machine.gate().pages(place.gpa, mmio.len.into())?;
            Some((place, page))
        }) else {
            return self.device_mmio(mmio);
        };
        self.seen_now();
        let access = place.view.unwrap_or(State::Private);
        if place.view.is_some() && !self.machine.gate().side(access).is_reachable() {
            return Err(self.failed(format!(
                "KVM emulates an access to the private view of {:#x} (string IO, or an instruction it does not execute \
                 natively), whose bytes the guest alone can reach: such operands belong in the shared view",
                place.gpa
            )));
        }
        if self.complete(&mmio, place, page)? {
            return Ok(Flow::Resume);
        }
        Ok(match self.judge(page, access, implied_flags(access))? {
            Judged::Look => Flow::Again(Exit::Mmio(mmio)),
            Judged::Leave(reason) => Flow::Leave(reason, Some(Exit::Mmio(mmio))),
        })
    }

    /// Carries the access out on the page itself, if the page is in the accessed state.
    fn complete(&mut self, mmio: &Mmio, place: Place, page: Range) -> Result<bool, Error> {
        let gate = self.machine.gate();
        let _held = gate.hold(page);
        let state = gate.with_map(|map| map.state(page.gpa()));
        if place.view.is_some_and(|view| view != state) {
            return Ok(false);
        }
        let side = gate.side(state);
        let len = usize::from(mmio.len);
        let mut data = mmio.data;
        let done = match mmio.write {
            true => side.write(place.gpa, &data[..len]),
            false => side.read(place.gpa, &mut data[..len]),
        };
        done.map_err(|errno| {
            let (gpa, side) = (place.gpa, state.as_str());
            self.failed(format!(
                "the {side} memory at {gpa:#x} could not be reached for an access that KVM emulates: {errno}"
            ))
        })?;
        if !mmio.write {
            decode::put(self.vcpu.hv.page(), decode::offset::MMIO_DATA, &data[..len]);
        }
        self.vcpu.reply_due = true;
        Ok(true)
    }

    /// An instruction that KVM could not emulate. If it could not be fetched because its page is in the other
    /// view, that is a request like any other; KVM fetches it again.
    fn internal_error(&mut self, suberror: u32) -> Result<Flow, Error> {
        if suberror == KVM_INTERNAL_ERROR_EMULATION
            && let Some((page, access)) = self.unfetchable()
        {
            self.seen_now();
            return Ok(match self.judge(page, access, implied_flags(access))? {
                Judged::Look => Flow::Resume,
                Judged::Leave(reason) => Flow::Leave(reason, None),
            });
        }
        let what = match suberror {
            KVM_INTERNAL_ERROR_EMULATION => "KVM could not emulate the guest's instruction there".to_owned(),
            other => format!("KVM reported internal error {other}"),
        };
        Err(self.failed(what))
    }

    fn unfetchable(&mut self) -> Option<(Range, State)> {
        let rip = self.vcpu.rip();
        let gate = self.machine.gate();
        // The instruction's first page and, where it crosses into one, its last.
        [rip, rip.saturating_add(LONGEST_INSTRUCTION - 1)]
            .into_iter()
            .find_map(|linear| {
                let place = gate.views().locate(self.vcpu.hv.translate(linear)?)?;
                let (page, view) = (Range::new(place.page(), PAGE_SIZE)?, place.view?);
                (gate.with_map(|map| map.state(place.gpa)) != view).then_some((page, view))
            })
    }

    /// What a memory fault is about, if its fields make sense.
    fn faulted(&mut self, fault: &MemoryFault) -> Result<(Range, State), Error> {
        let views = self.machine.gate().views();
        let nonsense = |what: &str| format!("KVM reported a memory fault with {what}: {fault:x?}");
        if fault.flags & !MEMORY_EXIT_FLAG_PRIVATE != 0 {
            return Err(self.failed(nonsense("unknown flags")));
        }
        let Some(place) = views.locate(fault.gpa) else {
            return Err(self.failed(nonsense("an address outside the guest's memory")));
        };
        let Some(page) = views.range(fault.gpa, fault.size) else {
            return Err(self.failed(nonsense("a range that is no part of the guest's memory")));
        };
        let gate = self.machine.gate();
        let access =
            place.view.unwrap_or_else(
                || match (fault.flags & MEMORY_EXIT_FLAG_PRIVATE, gate.enforcement().mode()) {
                    (0, Mode::Attributes) => State::Shared,
                    // One view and no attribute: the access met the page as it is, and KVM does not know what we call that.
                    (0, Mode::Memslots) => gate.with_map(|map| map.state(place.gpa)),
                    _ => State::Private,
                },
            );
        Ok((page, access))
    }

    /// Policy and conversion for one fault, if its page still is not in the accessed state.
    fn judge(&mut self, page: Range, access: State, flags: u64) -> Result<Judged, Error> {
        let sight = self.machine.gate().sight(&mut self.entry, page);
        let wanted = Wanted { page, access, sight };
        let (standing, examined) = self.machine.gate().examine(wanted, self.vcpu.index);
        if standing == Standing::Stale {
            self.tally.stale += 1;
            return Ok(Judged::Look);
        }
        let repeats = self.repeats(page, access, examined.changes);
        if standing == Standing::Agrees {
            if repeats >= LIVELOCK_BOUND {
                return Err(self.livelock(page, access, repeats));
            }
            self.back_off(repeats);
            return Ok(Judged::Look);
        }
        if repeats >= LIVELOCK_BOUND {
            return Ok(Judged::Leave("livelock".to_owned()));
        }
        self.back_off(repeats);
        let fault = Fault {
            vcpu: self.vcpu.index,
            range: page,
            access,
            flags,
            errno: Errno(libc::EFAULT),
            state: access.other(),
            rip: self.vcpu.rip(),
            repeats,
            time: self.exited.nanoseconds(),
            memory: self.machine.gate().views().size(),
        };
        self.tally.faults += 1;
        self.open_request(&about(&fault, Kind::Implicit));
        match self.machine.policy(&mut self.policy).memory_fault(&fault) {
            Ok(Decision::Convert(change)) => self.convert_implicit(&change, wanted, examined.look, &fault),
            decision => self.leave_implicit(decision, &fault),
        }
    }

    /// Any answer but Convert.
    fn leave_implicit(&mut self, decision: Result<Decision, Failure>, fault: &Fault) -> Result<Judged, Error> {
        match self.decided(decision, fault.range, fault.access)? {
            Decision::Deny(errno) => {
                self.tally.denied += 1;
                self.close(Outcome::Denied, errno.0);
                Ok(Judged::Leave("denied".to_owned()))
            }
            Decision::Retry => {
                self.tally.retries += 1;
                self.close(Outcome::Retried, 0);
                Ok(Judged::Look)
            }
            Decision::Wait(time) => {
                self.tally.retries += 1;
                self.close(Outcome::Retried, 0);
                self.close_request();
                self.control.pause(time);
                Ok(Judged::Look)
            }
            Decision::Stop(reason) => {
                self.close(Outcome::Stopped, 0);
                Ok(Judged::Leave(reason))
            }
            Decision::Discard | Decision::Convert(_) => Err(self.only_for_poison(&Self::faulting(fault))),
        }
    }

    fn only_for_poison(&self, site: &Site) -> Error {
        self.hook(site, "Discard() is an answer to memory_poison only".into())
    }

    fn convert_implicit(
        &mut self,
        change: &Conversion,
        wanted: Wanted,
        seen: Look,
        fault: &Fault,
    ) -> Result<Judged, Error> {
        let order = match self.order(change, seen, wanted.access) {
            Ok(order) => order,
            Err(failure) => return Err(self.hook(&Self::faulting(fault), failure)),
        };
        let gate = self.machine.gate();
        match gate.convert_if_still_wanted(order, wanted, &|| self.control.leaving()) {
            Ok(converted) => {
                self.converted(&order, converted);
                if change.prefault && converted != Converted::Superseded {
                    self.prefault(order.seen.range, order.to);
                }
                Ok(Judged::Look)
            }
            Err(ConvertError::OverQuota { .. }) => {
                self.over_quota();
                Ok(Judged::Leave("denied".to_owned()))
            }
            Err(ConvertError::Refused { .. }) => {
                self.tally.retries += 1;
                self.close(Outcome::Retried, 0);
                Ok(Judged::Look)
            }
            Err(source) => {
                self.close(Outcome::Failed, 0);
                Err(conversion(Self::faulting(fault), source))
            }
        }
    }

    fn poison(&mut self, fault: MemoryFault) -> Result<Flow, Error> {
        self.seen_now();
        let (page, access) = self.faulted(&fault)?;
        let changes = self.machine.gate().watch(self.vcpu.index, page.gpa());
        let repeats = self.repeats(page, access, changes);
        let poison = Fault {
            vcpu: self.vcpu.index,
            range: page,
            access,
            flags: fault.flags,
            errno: Errno(libc::EHWPOISON),
            state: self.machine.gate().with_map(|map| map.state(page.gpa())),
            rip: self.vcpu.rip(),
            repeats,
            time: self.exited.nanoseconds(),
            memory: self.machine.gate().views().size(),
        };
        self.tally.poisons += 1;
        self.open_request(&about(&poison, Kind::Poison));
        let decision = self.machine.policy(&mut self.policy).memory_poison(&poison);
        let decision = self.decided(decision, page, access)?;
        let site = self.site(Some(page));
        match decision {
            Decision::Convert(_) => Err(self.hook(&site, model::POISON_IS_NOT_CONVERTED.into())),
            Decision::Deny(errno) => {
                self.tally.denied += 1;
                self.close(Outcome::Denied, errno.0);
                Ok(Flow::Leave("denied".to_owned(), None))
            }
            Decision::Retry | Decision::Wait(_) if repeats >= LIVELOCK_BOUND => {
                Ok(Flow::Leave("livelock".to_owned(), None))
            }
            Decision::Retry | Decision::Wait(_) => {
                self.tally.retries += 1;
                self.close(Outcome::Retried, 0);
                self.back_off(repeats);
                Ok(Flow::Resume)
            }
            Decision::Stop(reason) => {
                self.close(Outcome::Stopped, 0);
                Ok(Flow::Leave(reason, None))
            }
            Decision::Discard if repeats >= LIVELOCK_BOUND => Err(self.livelock(page, access, repeats)),
            Decision::Discard => {
                let what = "free the poisoned page";
                self.machine
                    .gate()
                    .discard(page)
                    .map_err(|errno| Error::Host { what, errno })?;
                self.close(Outcome::Discarded, 0);
                Ok(Flow::Resume)
            }
        }
    }

    /// How often this fault came before without a change of its page.
    fn repeats(&mut self, page: Range, access: State, changes: u64) -> u32 {
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

    fn back_off(&self, repeats: u32) {
        if let Some(waits) = repeats.checked_sub(EAGER_REPEATS) {
            self.control
                .pause((Duration::from_micros(10) * waits).min(LONGEST_WAIT));
        }
    }

    // ---- explicit requests

    #[inline(always)]
    fn hypercall(&mut self, call: Hypercall) -> Result<(), Error> {
        let ret = self.explicit(call)?.to_le_bytes();
        decode::put(self.vcpu.hv.page(), decode::offset::HYPERCALL_RET, &ret);
        self.vcpu.reply_due = true;
        Ok(())
    }

    /// One that an earlier run left unanswered.
    #[cold]
    fn hypercall_left_over(&mut self, call: Hypercall) -> Result<Flow, Error> {
        self.hypercall(call).map(|()| Flow::Resume)
    }

    /// The hypercall by port: the same registers, the answer in RAX.
    fn doorbell(&mut self) -> Result<(), Error> {
        let regs = self.vcpu.regs().map_err(|errno| self.registers(errno))?;
        let call = Hypercall {
            nr: regs.rax,
            args: [regs.rbx, regs.rcx, regs.rdx],
        };
        let answer = self.explicit(call)?;
        self.vcpu.answer(answer as u64).map_err(|errno| self.registers(errno))?;
        self.vcpu.reply_due = true;
        Ok(())
    }

    /// What RAX becomes.
    #[inline(always)]
    fn explicit(&mut self, call: Hypercall) -> Result<i64, Error> {
        self.seen_now();
        self.put(call)
    }

    /// The same, for one that came before.
    #[inline(always)]
    fn put(&mut self, call: Hypercall) -> Result<i64, Error> {
        if call.nr != KVM_HC_MAP_GPA_RANGE {
            self.tally.malformed += 1;
            return Ok(-KVM_ENOSYS);
        }
        let request = match explicit::parse(&call, &self.machine.gate().views()) {
            Ok(request) => request,
            Err(errno) => {
                self.tally.malformed += 1;
                return Ok(errno.0.into());
            }
        };
        let range = request.range;
        let seen = self.machine.gate().look_at(range);
        let judged = Call {
            vcpu: self.vcpu.index,
            range,
            to: request.to,
            page_size: request.page_size,
            raw: request.raw,
            state: seen.uniform,
            time: self.exited.nanoseconds(),
            memory: self.machine.gate().views().size(),
        };
        self.tally.hypercalls += 1;
        self.open_request(&Asked {
            time: judged.time,
            kind: Kind::Explicit,
            gpa: range.gpa(),
            size: range.size(),
            to: request.to,
            state: judged.state,
            // Both have passed the parser: a hint of at most 1 GiB, and five bits.
            page_size: request.page_size as u32,
            raw: request.raw as u32,
            flags: 0,
            rip: 0,
            repeats: 0,
        });
        match self.machine.policy(&mut self.policy).map_gpa_range(&judged) {
            Ok(Decision::Convert(change)) => self.convert_explicit(&change, &judged, seen),
            decision => Ok(self.leave_explicit(decision, &judged)?.into()),
        }
    }

    /// Any answer but Convert: the errno for the guest.
    fn leave_explicit(&mut self, decision: Result<Decision, Failure>, call: &Call) -> Result<i32, Error> {
        match self.decided(decision, call.range, call.to)? {
            Decision::Deny(errno) => {
                self.tally.denied += 1;
                self.close(Outcome::Denied, errno.0);
                Ok(errno.0)
            }
            Decision::Retry | Decision::Wait(_) => {
                self.tally.retries += 1;
                self.close(Outcome::Retried, libc::EAGAIN);
                Ok(libc::EAGAIN)
            }
            // Nothing was done, so a guest that goes on later has to ask again.
            Decision::Stop(reason) => {
                self.close(Outcome::Stopped, libc::EAGAIN);
                self.control.finish(Ok(reason));
                Ok(libc::EAGAIN)
            }
            Decision::Discard | Decision::Convert(_) => {
                let site = self.called(call);
                Err(self.only_for_poison(&site))
            }
        }
    }

    /// What RAX becomes: the errno for the guest, 0 for success.
    #[inline(always)]
    fn convert_explicit(&mut self, change: &Conversion, call: &Call, seen: Look) -> Result<i64, Error> {
        let order = match self.order(change, seen, call.to) {
            Ok(order) => order,
            Err(failure) => {
                let site = self.called(call);
                return Err(self.hook(&site, failure));
            }
        };
        let gate = self.machine.gate();
        match gate.convert_as_told(order, &|| self.control.leaving()) {
            Ok(Converted::Superseded) => self.ask_again(call),
            Ok(converted) => {
                let errno = self.converted(&order, converted);
                if change.prefault {
                    self.prefault(order.seen.range, order.to);
                }
                Ok(errno.into())
            }
            Err(source) => Ok(self.not_converted(source, call)?.into()),
        }
    }

    /// The pages changed while the policy judged, so that it has to know; not for ever, if others go on changing them. It is
    /// one request all the same, with one row in the log, of the judgement that counts.
    #[cold]
    #[inline(never)]
    fn ask_again(&mut self, call: &Call) -> Result<i64, Error> {
        if self.asked_again == ASKED_AGAIN_BOUND || self.control.leaving() {
            self.tally.retries += 1;
            self.close(Outcome::Retried, libc::EAGAIN);
            return Ok(libc::EAGAIN.into());
        }
        self.asked_again += 1;
        self.tally.hypercalls -= 1;
        self.vcpu.log.forget();
        let pages = call.range.size() / PAGE_SIZE;
        let answer = self.put(Hypercall {
            nr: KVM_HC_MAP_GPA_RANGE,
            args: [call.range.gpa(), pages, call.raw],
        });
        self.asked_again = 0;
        answer
    }

    #[cold]
    fn not_converted(&mut self, source: ConvertError, call: &Call) -> Result<i32, Error> {
        if matches!(source, ConvertError::OverQuota { .. }) {
            self.over_quota();
            return Ok(libc::EINVAL);
        }
        let errno = source.guest_errno();
        self.close(Outcome::Failed, errno.map_or(0, |errno| errno.0));
        match errno {
            Some(errno) => Ok(errno.0),
            None => Err(conversion(self.called(call), source)),
        }
    }

    // ---- both

    /// What the policy wants converted, which may be another range or state than was asked for.
    #[inline(always)]
    fn order(&mut self, change: &Conversion, seen: Look, to: State) -> Result<Order, Failure> {
        let asked = seen.range;
        let answer = Answer::convert(change, asked, to);
        self.vcpu.log.decided(&answer);
        let (told, seen) = match (answer.gpa, answer.size) == (asked.gpa(), asked.size()) {
            true => (None, seen),
            false => (Some(seen), self.look_elsewhere(answer.gpa, answer.size)?),
        };
        self.machine.gate().asked(&mut self.entry, &seen);
        Ok(Order {
            seen,
            told,
            to: answer.to,
            keep: change.keep,
            max_shared: change.max_shared,
        })
    }

    #[cold]
    fn look_elsewhere(&self, gpa: u64, size: u64) -> Result<Look, Failure> {
        let range = self.machine.gate().range(gpa, size);
        let range = range.map_err(|error| format!("Convert: {error}"))?;
        Ok(self.machine.gate().look_at(range))
    }

    /// A quota is a part of the policy, and it was the gate that could tell.
    fn over_quota(&mut self) {
        self.tally.denied += 1;
        self.vcpu.log.refused(Errno(libc::EINVAL));
    }

    /// Books what was done: the errno for a guest that asked, 0 for all of it.
    #[inline]
    fn converted(&mut self, order: &Order, converted: Converted) -> i32 {
        let (range, to) = (order.seen.range, order.to);
        let (changed, size, outcome, errno) = match converted {
            Converted::Done { changed } => {
                self.tally.conversions += 1;
                (changed, range.size(), Outcome::Converted, 0)
            }
            Converted::Interrupted { changed, size } => {
                self.tally.retries += 1;
                (changed, size, Outcome::Retried, libc::EAGAIN)
            }
            Converted::Superseded => {
                self.tally.stale += 1;
                self.close(Outcome::Superseded, 0);
                return 0;
            }
        };
        match to {
            State::Private => self.tally.bytes_to_private += changed,
            State::Shared => self.tally.bytes_to_shared += changed,
        }
        let done = Done {
            gpa: range.gpa(),
            size,
            to,
            changed,
        };
        self.vcpu.log.ended(outcome, errno, &done);
        errno
    }

    /// Has KVM map what was just converted. What it cannot map the guest will fault in, as it would have anyway.
    ///
    /// The ioctl may write the union of the run page, so the answer to a request is written after it.
    fn prefault(&mut self, range: Range, to: State) {
        if !self.machine.can_prefault() {
            return;
        }
        let view = self.machine.gate().views().view(range, to);
        let mut start = view.gpa();
        let mut refused = 0;
        while let Some(left) = Range::new(start, view.end() - start)
            && !self.control.leaving()
        {
            let chunk = left.size().min(PREFAULT_CHUNK);
            let chunk = Range::new(start, chunk).unwrap_or(left);
            match self.vcpu.hv.pre_fault(chunk) {
                Ok(done) if done > 0 => {
                    start += done.min(chunk.size());
                    self.tally.bytes_prefaulted += done;
                    refused = 0;
                }
                Err(Errno(libc::EAGAIN | libc::EINTR)) if refused < KVM_RUN_BOUND => {
                    refused += 1;
                    self.back_off(refused);
                }
                _ => break,
            }
        }
    }

    // ---- record

    /// The exit that is being handled can be a request.
    #[inline]
    fn seen_now(&mut self) {
        self.exited = Moment::now();
        self.exit_mark = self.watch.mark(self.exited);
    }

    #[inline(always)]
    fn open_request(&mut self, asked: &Asked) {
        if self.vcpu.log.is_open() {
            self.close_request();
        }
        self.since = self.exit_mark;
        self.vcpu.log.begin(asked);
    }

    /// What the policy made of the request that is open.
    fn decided(&mut self, decision: Result<Decision, Failure>, asked: Range, to: State) -> Result<Decision, Error> {
        match decision {
            Ok(decision) => {
                self.vcpu.log.decided(&Answer::of(&decision, asked, to));
                Ok(decision)
            }
            Err(failure) => {
                let site = self.site(Some(asked));
                Err(self.hook(&site, failure))
            }
        }
    }

    /// What came of it, where nothing was converted.
    fn close(&mut self, outcome: Outcome, errno: i32) {
        self.vcpu.log.ended_with_nothing(outcome, errno);
    }

    /// The request that was open is over: the guest resumes, or the run ends.
    #[inline(always)]
    fn close_request(&mut self) {
        self.machine.events().about_to_publish();
        let latency = self.watch.elapsed(self.since);
        self.tally.latency.record(latency);
        self.machine.events().publish(&mut self.vcpu.log, latency);
    }

    // ---- devices

    fn io(&mut self, io: Io) -> Result<Flow, Error> {
        self.vcpu.reply_due = true;
        let data = self
            .vcpu
            .hv
            .page()
            .get_mut(io.data..io.data + io.len())
            .unwrap_or_default();
        match self.machine.devices().port(io.port, &mut self.known_port) {
            Some(handler) => {
                if let Err(failure) = handler.io(self.vcpu.index, &io, data) {
                    let site = self.site(None);
                    return Err(self.hook(&site, failure));
                }
            }
            // As on a bus where nobody answers.
            None if !io.write => data.fill(0xff),
            None => {}
        }
        Ok(Flow::Resume)
    }

    fn device_mmio(&mut self, mmio: Mmio) -> Result<Flow, Error> {
        self.vcpu.reply_due = true;
        let len = usize::from(mmio.len);
        let mut data = mmio.data;
        match self.machine.devices().mmio(mmio.gpa, mmio.len.into()) {
            Some(handler) => {
                if let Err(failure) = handler.mmio(self.vcpu.index, &mmio, &mut data[..len]) {
                    let mut site = self.site(None);
                    site.gpa = Some(mmio.gpa);
                    return Err(self.hook(&site, failure));
                }
            }
            None => data.fill(0xff),
        }
        if !mmio.write {
            decode::put(self.vcpu.hv.page(), decode::offset::MMIO_DATA, &data[..len]);
        }
        Ok(Flow::Resume)
    }

    // ---- what ends a run

    fn refused(&mut self, errno: Errno) -> Result<Flow, Error> {
        self.refused += 1;
        if self.refused > KVM_RUN_BOUND {
            let times = self.refused;
            return Err(self.failed(format!("KVM_RUN failed with {errno} {times} times in a row")));
        }
        self.back_off(self.refused);
        Ok(Flow::Resume)
    }

    fn site(&mut self, pages: Option<Range>) -> Site {
        Site {
            vcpu: self.vcpu.index,
            gpa: pages.map(|range| range.gpa()),
            state: pages.map(|range| self.machine.gate().describe(range)),
            rip: self.vcpu.rip(),
        }
    }

    /// Where an explicit request was made, with the pages as they were then.
    fn called(&mut self, call: &Call) -> Site {
        Site {
            vcpu: call.vcpu,
            gpa: Some(call.range.gpa()),
            state: Some(call.state.map_or("mixed", State::as_str)),
            rip: self.vcpu.rip(),
        }
    }

    /// Where an implicit request was made, with its page as it was then.
    fn faulting(fault: &Fault) -> Site {
        Site {
            vcpu: fault.vcpu,
            gpa: Some(fault.range.gpa()),
            state: Some(fault.state.as_str()),
            rip: fault.rip,
        }
    }

    fn hook(&self, site: &Site, failure: Failure) -> Error {
        Error::Hook {
            site: site.clone(),
            failure,
        }
    }

    fn failed(&mut self, what: String) -> Error {
        let site = self.site(None);
        Error::Exit { site, what }
    }

    fn registers(&mut self, errno: Errno) -> Error {
        self.failed(format!("the registers cannot be reached: {errno}"))
    }

    fn bad_backing(&mut self) -> Error {
        let gate = self.machine.gate();
        let all = gate.pages(0, gate.views().size());
        let slot = all.map_or_else(String::new, |all| gate.enforcement().describe_slots(all));
        Error::BadBacking {
            site: self.site(None),
            slot,
        }
    }

    fn livelock(&mut self, page: Range, access: State, repeats: u32) -> Error {
        let events = self.machine.events().about(page.gpa(), 8);
        let line = |event: &Event| {
            let (kind, to, outcome) = (event.kind.as_str(), event.to, event.outcome.as_str());
            format!(
                "\n  event {}: vCPU {} {kind} to {to}: {outcome}",
                event.sequence, event.vcpu
            )
        };
        let lines: String = events.iter().map(line).collect();
        Error::Livelock {
            site: self.site(Some(page)),
            access: access.as_str(),
            repeats,
            history: match lines.is_empty() {
                true => "; no earlier request was about this page".to_owned(),
                false => format!("; the last requests about this page:{lines}"),
            },
        }
    }
}

/// An implicit request, or a poisoned page, for the log.
fn about(fault: &Fault, kind: Kind) -> Asked {
    Asked {
        time: fault.time,
        kind,
        gpa: fault.range.gpa(),
        size: fault.range.size(),
        to: fault.access,
        state: Some(fault.state),
        page_size: 0,
        raw: 0,
        // Only one flag is known, and others reach no policy.
        flags: fault.flags as u32,
        rip: fault.rip,
        repeats: fault.repeats,
    }
}

/// A conversion that failed; a listener's failure is one of a hook's.
fn conversion(site: Site, source: ConvertError) -> Error {
    match source {
        ConvertError::Listener(failure) => Error::Hook { site, failure },
        source => Error::Conversion { site, source },
    }
}

/// The flags KVM would have reported.
fn implied_flags(access: State) -> u64 {
    match access {
        State::Private => MEMORY_EXIT_FLAG_PRIVATE,
        State::Shared => 0,
    }
}
