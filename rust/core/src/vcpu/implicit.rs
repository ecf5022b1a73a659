//! Implicit requests: the guest accessed a page that is not in the accessed state.
//!
//! With attributes KVM exits with KVM_EXIT_MEMORY_FAULT, and the guest executes the instruction again. With memslots it
//! exits with KVM_EXIT_MMIO: KVM has emulated the instruction up to the access, and the access is completed here once
//! the page is in the accessed state.

use kvm_bindings::KVM_INTERNAL_ERROR_EMULATION;

use super::read_back;
use super::request::conversion_failed;
use super::running::{Flow, LIVELOCK_BOUND, RunningVcpu, hook_failed};
use super::unpaged::{self, Unpaged};
use crate::errno::Errno;
use crate::error::{ConvertError, Error, Failure, Site};
use crate::events::event::{Asked, Kind, Outcome};
use crate::hypervisor::exit::{Exit, FLAG_PRIVATE, MemoryFault, Mmio, offset, put};
use crate::hypervisor::host::EnforcementMode;
use crate::memory::address::{PAGE_SIZE, Range, State};
use crate::memory::conversion::{Condition, Converted, Progress};
use crate::memory::guest_memory::{FaultStatus, FaultingAccess};
use crate::memory::views::Place;
use crate::policy::decision::{Convert, Decision};
use crate::policy::request::{ImplicitRequest, Request};
use crate::policy::trial::DISCARD_IS_FOR_POISON;

/// Bytes of the longest x86 instruction.
const LONGEST_INSTRUCTION: u64 = 15;

/// What came of a request.
enum Next {
    /// Handled: check the page's state again, or let the guest access it again.
    LookAgain,
    /// The run ends.
    Leave(String),
}

/// KVM_EXIT_MEMORY_FAULT.
pub(super) fn memory_fault(vcpu: &mut RunningVcpu<'_>, fault: &MemoryFault) -> Result<Flow, Error> {
    vcpu.note_time();
    let (page, access) = faulted(vcpu, fault)?;
    resume(judge(vcpu, page, access, fault.flags, false)?)
}

/// The view and the page of an access that has no memslot; `None` if its address is not in guest memory (a device's).
pub(super) fn in_memory(vcpu: &RunningVcpu<'_>, mmio: &Mmio) -> Option<(Place, Range)> {
    let place = vcpu.context.memory.views().locate(mmio.gpa)?;
    let page = vcpu.context.memory.pages(place.gpa, mmio.len.into())?;
    Some((place, page))
}

/// KVM_EXIT_MMIO in guest memory: asks the policy and converts until the access can be completed, or the run ends.
pub(super) fn emulated_access(
    vcpu: &mut RunningVcpu<'_>,
    mmio: &Mmio,
    (place, page): (Place, Range),
) -> Result<Flow, Error> {
    let access = place.view.unwrap_or(State::Private);
    if place.view.is_some() && !vcpu.context.memory.is_reachable(access) {
        return Err(vcpu.failed(format!(
            "KVM emulates an access to the private view of {:#x} (string IO, or an instruction it does not execute \
             natively), whose bytes the guest alone can reach: such operands belong in the shared view",
            place.gpa
        )));
    }
    if !mmio.write && vcpu.taken_back.is_some() {
        let access = place.view.unwrap_or_else(|| vcpu.context.memory.state(place.gpa));
        read_back::begin(vcpu, mmio, page, access)?;
    }
    loop {
        // Each pass may be a request of its own, with its own time.
        vcpu.note_time();
        if complete(vcpu, mmio, place, page)? {
            if !mmio.write {
                read_back::finish(vcpu, mmio)?;
            }
            return Ok(Flow::Resume);
        }
        if let Next::Leave(reason) = judge(vcpu, page, access, implied_flags(access), mmio.write)? {
            return Ok(Flow::Leave(reason, Some(Exit::Mmio(*mmio))));
        }
        if vcpu.context.control.leaving() {
            return Ok(Flow::Postpone(Exit::Mmio(*mmio)));
        }
    }
}

/// Does the access in the page's memory, if the page is in the accessed state; returns whether it was.
fn complete(vcpu: &mut RunningVcpu<'_>, mmio: &Mmio, place: Place, page: Range) -> Result<bool, Error> {
    let len = usize::from(mmio.len);
    let mut data = mmio.data;
    let done = vcpu
        .context
        .memory
        .access_emulated(place, page, mmio.write, &mut data[..len]);
    let done = done.map_err(|errno| {
        let gpa = place.gpa;
        vcpu.failed(format!(
            "the memory at {gpa:#x} could not be reached for an access that KVM emulates: {errno}"
        ))
    })?;
    if done {
        if !mmio.write {
            put(vcpu.state.hv.kvm_run(), offset::MMIO_DATA, &data[..len]);
        }
        vcpu.state.reply_due = true;
    }
    Ok(done)
}

/// KVM_EXIT_INTERNAL_ERROR. If KVM could not fetch an instruction because its page is not in the state of the view it
/// is fetched through, that is an implicit request, and KVM fetches it again afterwards.
pub(super) fn internal_error(vcpu: &mut RunningVcpu<'_>, suberror: u32) -> Result<Flow, Error> {
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            if let Some((page, access)) = unfetchable(vcpu) {
                vcpu.note_time();
                return resume(judge(vcpu, page, access, implied_flags(access), false)?);
            }
            "KVM could not emulate the guest's instruction there".to_owned()
        }
        other => format!("KVM reported internal error {other}"),
    };
    Err(vcpu.failed(what))
}

fn resume(judged: Next) -> Result<Flow, Error> {
    Ok(match judged {
        Next::LookAgain => Flow::Resume,
        Next::Leave(reason) => Flow::Leave(reason, None),
    })
}

/// The instruction's first or last page, whichever is not in the state of the view it is fetched through; and that
/// state.
fn unfetchable(vcpu: &mut RunningVcpu<'_>) -> Option<(Range, State)> {
    let first = vcpu.linear_rip()?;
    let memory = vcpu.context.memory;
    let ends = [first, first.saturating_add(LONGEST_INSTRUCTION - 1)];
    ends.into_iter().find_map(|linear| {
        let place = memory.views().locate(vcpu.state.hv.translate(linear)?)?;
        let (page, view) = (Range::new(place.page(), PAGE_SIZE)?, place.view?);
        (memory.state(place.gpa) != view && !memory.is_open(page)).then_some((page, view))
    })
}

/// The page and the accessed state of a memory fault; an error if its fields make no sense.
pub(super) fn faulted(vcpu: &mut RunningVcpu<'_>, fault: &MemoryFault) -> Result<(Range, State), Error> {
    let memory = vcpu.context.memory;
    let views = memory.views();
    let nonsense = |what: &str| format!("KVM reported a memory fault with {what}: {fault:x?}");
    if fault.flags & !FLAG_PRIVATE != 0 {
        return Err(vcpu.failed(nonsense("unknown flags")));
    }
    let Some(place) = views.locate(fault.gpa) else {
        return Err(vcpu.failed(nonsense("an address outside the guest's memory")));
    };
    let Some(page) = views.range(fault.gpa, fault.size) else {
        return Err(vcpu.failed(nonsense("a range that is no part of the guest's memory")));
    };
    let access = place
        .view
        .unwrap_or_else(|| match (fault.flags & FLAG_PRIVATE, memory.mode()) {
            (0, EnforcementMode::Attributes | EnforcementMode::Traps) => State::Shared,
            // Memslots with one view: KVM knows no states, so the accessed state is the one that the page is in.
            (0, EnforcementMode::Memslots) => memory.state(place.gpa),
            _ => State::Private,
        });
    Ok((page, access))
}

/// Asks the policy about one fault and converts, if the page still is not in the accessed state. `executed`: see
/// [`ImplicitRequest`].
fn judge(vcpu: &mut RunningVcpu<'_>, page: Range, access: State, flags: u64, executed: bool) -> Result<Next, Error> {
    let fault = FaultingAccess {
        page,
        access,
        entry: vcpu.entry,
    };
    let (status, changes) = vcpu.context.memory.examine(&fault, vcpu.state.index);
    if status == FaultStatus::Spurious {
        vcpu.tally.stale += 1;
        return Ok(Next::LookAgain);
    }
    let opened = match (status, access) {
        (FaultStatus::Request, State::Shared) => unpaged::open(vcpu, page)?,
        _ => Unpaged::No,
    };
    if matches!(opened, Unpaged::Opened) {
        return Ok(Next::LookAgain);
    }
    let repeats = vcpu.repeats(page, access, changes);
    if matches!(opened, Unpaged::WasOpen) {
        // Another vCPU's access may have opened it meanwhile.
        vcpu.back_off(repeats);
        return match repeats < LIVELOCK_BOUND {
            true => Ok(Next::LookAgain),
            false => Ok(Next::Leave("livelock".to_owned())),
        };
    }
    if status == FaultStatus::Unexplained && repeats >= LIVELOCK_BOUND {
        return Err(vcpu.livelock(page, access, repeats));
    }
    if repeats >= LIVELOCK_BOUND {
        return Ok(Next::Leave("livelock".to_owned()));
    }
    vcpu.back_off(repeats);
    if status == FaultStatus::Unexplained {
        return Ok(Next::LookAgain);
    }
    let request = ImplicitRequest {
        vcpu: vcpu.state.index,
        range: page,
        access,
        flags,
        errno: Errno(libc::EFAULT),
        state: access.other(),
        rip: vcpu.rip(),
        executed,
        repeats,
        time: vcpu.exited,
        memory: *vcpu.context.memory.views(),
    };
    vcpu.tally.faults += 1;
    vcpu.open_request(&about(&request, Kind::Implicit));
    let decision = vcpu.context.policy.get(&mut vcpu.policy).memory_fault(&request);
    match &decision {
        Ok(Decision::Convert(convert)) => carry_out(vcpu, convert, fault, &request),
        _ => not_converted(vcpu, decision, &request),
    }
}

fn carry_out(
    vcpu: &mut RunningVcpu<'_>,
    convert: &Convert,
    fault: FaultingAccess,
    request: &ImplicitRequest,
) -> Result<Next, Error> {
    let (mut order, as_asked) = match vcpu.order(convert, Request::Implicit(request)) {
        Ok(order) => order,
        Err(failure) => return Err(hook_failed(site(request), failure)),
    };
    match vcpu.carry_out(
        convert,
        (&mut order, as_asked),
        Condition::StillFaulting(fault),
        Request::Implicit(request),
    ) {
        Ok(converted) => {
            vcpu.converted(&order, converted);
            if convert.prefault && converted != Converted::Superseded {
                vcpu.prefault(order.range, order.to);
            }
            Ok(Next::LookAgain)
        }
        Err(ConvertError::OverQuota { .. }) => {
            vcpu.over_quota();
            Ok(Next::Leave("denied".to_owned()))
        }
        Err(source) if source.is_refusal() => {
            vcpu.tally.retries += 1;
            vcpu.close_with(&order, Progress::before(&source), Outcome::Retried, 0);
            Ok(Next::LookAgain)
        }
        Err(source) => {
            vcpu.close_with(&order, Progress::before(&source), Outcome::Failed, 0);
            Err(conversion_failed(site(request), source))
        }
    }
}

/// Any decision but Convert.
fn not_converted(
    vcpu: &mut RunningVcpu<'_>,
    decision: Result<Decision, Failure>,
    request: &ImplicitRequest,
) -> Result<Next, Error> {
    match vcpu.decided(decision, request.range, request.access)? {
        Decision::Deny(errno) => {
            vcpu.tally.denied += 1;
            vcpu.close_as(Outcome::Denied, errno.0);
            Ok(Next::Leave("denied".to_owned()))
        }
        Decision::Retry => {
            vcpu.tally.retries += 1;
            vcpu.close_as(Outcome::Retried, 0);
            Ok(Next::LookAgain)
        }
        Decision::Wait(time) => {
            vcpu.tally.retries += 1;
            vcpu.close_as(Outcome::Retried, 0);
            vcpu.close_request();
            vcpu.context.control.pause(time);
            Ok(Next::LookAgain)
        }
        Decision::Stop(reason) => {
            vcpu.close_as(Outcome::Stopped, 0);
            Ok(Next::Leave(reason))
        }
        Decision::Discard | Decision::Convert(_) | Decision::Remember(_) => {
            Err(hook_failed(site(request), DISCARD_IS_FOR_POISON.into()))
        }
    }
}

/// Where the request was made, with the state that its page was in.
fn site(request: &ImplicitRequest) -> Site {
    Site {
        vcpu: request.vcpu,
        gpa: Some(request.range.gpa()),
        state: Some(request.state.as_str()),
        rip: request.rip,
        symbol: None,
    }
}

/// An implicit request, or one about a poisoned page, as it is logged.
pub(super) fn about(request: &ImplicitRequest, kind: Kind) -> Asked {
    Asked {
        time: request.time,
        kind,
        gpa: request.range.gpa(),
        size: request.range.size(),
        to: request.access,
        state: Some(request.state),
        page_size: 0,
        raw: 0,
        // Does not truncate: a fault with any flag but KVM_MEMORY_EXIT_FLAG_PRIVATE was refused in `faulted`.
        flags: request.flags as u32,
        rip: request.rip,
        repeats: request.repeats,
    }
}

/// The flags that KVM_EXIT_MEMORY_FAULT would have had for this access.
fn implied_flags(access: State) -> u64 {
    match access {
        State::Private => FLAG_PRIVATE,
        State::Shared => 0,
    }
}
