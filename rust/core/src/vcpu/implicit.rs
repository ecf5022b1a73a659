//! Implicit requests: an access met a page that is not in the accessed state.
//!
//! Under attributes that is KVM_EXIT_MEMORY_FAULT, and the guest executes the instruction again. Under memslots it is
//! KVM_EXIT_MMIO: KVM has emulated the instruction as far as the access, which is completed here once the page is in the
//! accessed state.

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, KVM_MEMORY_EXIT_FLAG_PRIVATE};

use super::request::conversion_failed;
use super::running::{Flow, LIVELOCK_BOUND, RunningVcpu, hook_failed};
use crate::errno::Errno;
use crate::error::{ConvertError, Error, Failure, Site};
use crate::events::event::{Asked, Kind, Outcome};
use crate::hypervisor::exit::{Exit, MemoryFault, Mmio, offset, put};
use crate::hypervisor::host::EnforcementMode;
use crate::memory::address::{PAGE_SIZE, Range, State};
use crate::memory::conversion::{Condition, Converted};
use crate::memory::guest_memory::{FaultStatus, FaultingAccess};
use crate::memory::views::Place;
use crate::policy::decision::{Convert, Decision};
use crate::policy::request::ImplicitRequest;
use crate::policy::trial::DISCARD_IS_FOR_POISON;

const FLAG_PRIVATE: u64 = KVM_MEMORY_EXIT_FLAG_PRIVATE as u64;
/// Bytes of the longest instruction of the architecture.
const LONGEST_INSTRUCTION: u64 = 15;

/// What came of a request.
enum Judged {
    /// Nothing more to decide: look at the page again.
    LookAgain,
    /// The run ends.
    Leave(String),
}

/// KVM_EXIT_MEMORY_FAULT.
pub(super) fn memory_fault(vcpu: &mut RunningVcpu<'_>, fault: &MemoryFault) -> Result<Flow, Error> {
    vcpu.note_time();
    let (page, access) = faulted(vcpu, fault)?;
    resume(judge(vcpu, page, access, fault.flags)?)
}

/// The place in memory that an access without a memslot is about: its view and its page. `None` for a device's.
pub(super) fn in_memory(vcpu: &RunningVcpu<'_>, mmio: &Mmio) -> Option<(Place, Range)> {
    let place = vcpu.context.memory.views().locate(mmio.gpa)?;
    let page = vcpu.context.memory.pages(place.gpa, mmio.len.into())?;
    Some((place, page))
}

/// KVM_EXIT_MMIO in memory: judged, converted and completed, until one of them is final.
pub(super) fn emulated_access(
    vcpu: &mut RunningVcpu<'_>,
    mmio: &Mmio,
    (place, page): (Place, Range),
) -> Result<Flow, Error> {
    vcpu.note_time();
    let access = place.view.unwrap_or(State::Private);
    if place.view.is_some() && !vcpu.context.memory.is_reachable(access) {
        return Err(vcpu.failed(format!(
            "KVM emulates an access to the private view of {:#x} (string IO, or an instruction it does not execute \
             natively), whose bytes the guest alone can reach: such operands belong in the shared view",
            place.gpa
        )));
    }
    loop {
        if complete(vcpu, mmio, place, page)? {
            return Ok(Flow::Resume);
        }
        if let Judged::Leave(reason) = judge(vcpu, page, access, implied_flags(access))? {
            return Ok(Flow::Leave(reason, Some(Exit::Mmio(*mmio))));
        }
        if vcpu.context.control.leaving() {
            return Ok(Flow::Postpone(Exit::Mmio(*mmio)));
        }
    }
}

/// Carries the access out on the page itself, if the page is in the accessed state.
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

/// KVM_EXIT_INTERNAL_ERROR. An instruction that could not be fetched because its page is in the other view is a request
/// like any other; KVM fetches it again.
pub(super) fn internal_error(vcpu: &mut RunningVcpu<'_>, suberror: u32) -> Result<Flow, Error> {
    let what = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            if let Some((page, access)) = unfetchable(vcpu) {
                vcpu.note_time();
                return resume(judge(vcpu, page, access, implied_flags(access))?);
            }
            "KVM could not emulate the guest's instruction there".to_owned()
        }
        other => format!("KVM reported internal error {other}"),
    };
    Err(vcpu.failed(what))
}

fn resume(judged: Judged) -> Result<Flow, Error> {
    Ok(match judged {
        Judged::LookAgain => Flow::Resume,
        Judged::Leave(reason) => Flow::Leave(reason, None),
    })
}

/// The page of the instruction that is not in the view through which it is fetched: its first or its last.
fn unfetchable(vcpu: &mut RunningVcpu<'_>) -> Option<(Range, State)> {
    let rip = vcpu.rip();
    let memory = vcpu.context.memory;
    let ends = [rip, rip.saturating_add(LONGEST_INSTRUCTION - 1)];
    ends.into_iter().find_map(|linear| {
        let place = memory.views().locate(vcpu.state.hv.translate(linear)?)?;
        let (page, view) = (Range::new(place.page(), PAGE_SIZE)?, place.view?);
        (memory.state(place.gpa) != view).then_some((page, view))
    })
}

/// What a memory fault is about, if its fields make sense.
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
            (0, EnforcementMode::Attributes) => State::Shared,
            // One view and no attribute: the access met the page as it is, and KVM does not know which state that is.
            (0, EnforcementMode::Memslots) => memory.state(place.gpa),
            _ => State::Private,
        });
    Ok((page, access))
}

/// Policy and conversion for one fault, if its page still is not in the accessed state.
fn judge(vcpu: &mut RunningVcpu<'_>, page: Range, access: State, flags: u64) -> Result<Judged, Error> {
    let fault = FaultingAccess {
        page,
        access,
        entry: vcpu.entry,
    };
    let (status, changes) = vcpu.context.memory.examine(&fault, vcpu.state.index);
    if status == FaultStatus::Spurious {
        vcpu.tally.stale += 1;
        return Ok(Judged::LookAgain);
    }
    let repeats = vcpu.repeats(page, access, changes);
    if status == FaultStatus::Unexplained && repeats >= LIVELOCK_BOUND {
        return Err(vcpu.livelock(page, access, repeats));
    }
    if repeats >= LIVELOCK_BOUND {
        return Ok(Judged::Leave("livelock".to_owned()));
    }
    vcpu.back_off(repeats);
    if status == FaultStatus::Unexplained {
        return Ok(Judged::LookAgain);
    }
    let request = ImplicitRequest {
        vcpu: vcpu.state.index,
        range: page,
        access,
        flags,
        errno: Errno(libc::EFAULT),
        state: access.other(),
        rip: vcpu.rip(),
        repeats,
        time: vcpu.exited,
        memory: vcpu.context.memory.size(),
    };
    vcpu.tally.faults += 1;
    vcpu.open_request(&about(&request, Kind::Implicit));
    match vcpu.context.policy.get(&mut vcpu.policy).memory_fault(&request) {
        Ok(Decision::Convert(convert)) => carry_out(vcpu, &convert, fault, &request),
        decision => not_converted(vcpu, decision, &request),
    }
}

fn carry_out(
    vcpu: &mut RunningVcpu<'_>,
    convert: &Convert,
    fault: FaultingAccess,
    request: &ImplicitRequest,
) -> Result<Judged, Error> {
    let order = match vcpu.order(convert, request.range, request.access) {
        Ok(order) => order,
        Err(failure) => return Err(hook_failed(site(request), failure)),
    };
    let control = vcpu.context.control;
    let condition = Condition::StillFaulting(fault);
    let converted = vcpu.context.memory.convert_if(&order, condition, &|| control.leaving());
    match converted {
        Ok(converted) => {
            vcpu.converted(&order, converted);
            if convert.prefault && converted != Converted::Superseded {
                vcpu.prefault(order.range, order.to);
            }
            Ok(Judged::LookAgain)
        }
        Err(ConvertError::OverQuota { .. }) => {
            vcpu.over_quota();
            Ok(Judged::Leave("denied".to_owned()))
        }
        Err(ConvertError::Refused { .. }) => {
            vcpu.tally.retries += 1;
            vcpu.close_as(Outcome::Retried, 0);
            Ok(Judged::LookAgain)
        }
        Err(source) => {
            vcpu.close_as(Outcome::Failed, 0);
            Err(conversion_failed(site(request), source))
        }
    }
}

/// Any decision but Convert.
fn not_converted(
    vcpu: &mut RunningVcpu<'_>,
    decision: Result<Decision, Failure>,
    request: &ImplicitRequest,
) -> Result<Judged, Error> {
    match vcpu.decided(decision, request.range, request.access)? {
        Decision::Deny(errno) => {
            vcpu.tally.denied += 1;
            vcpu.close_as(Outcome::Denied, errno.0);
            Ok(Judged::Leave("denied".to_owned()))
        }
        Decision::Retry => {
            vcpu.tally.retries += 1;
            vcpu.close_as(Outcome::Retried, 0);
            Ok(Judged::LookAgain)
        }
        Decision::Wait(time) => {
            vcpu.tally.retries += 1;
            vcpu.close_as(Outcome::Retried, 0);
            vcpu.close_request();
            vcpu.context.control.pause(time);
            Ok(Judged::LookAgain)
        }
        Decision::Stop(reason) => {
            vcpu.close_as(Outcome::Stopped, 0);
            Ok(Judged::Leave(reason))
        }
        Decision::Discard | Decision::Convert(_) | Decision::Remember(_) => {
            Err(hook_failed(site(request), DISCARD_IS_FOR_POISON.into()))
        }
    }
}

/// Where it was made, with its page as it was then.
fn site(request: &ImplicitRequest) -> Site {
    Site {
        vcpu: request.vcpu,
        gpa: Some(request.range.gpa()),
        state: Some(request.state.as_str()),
        rip: request.rip,
    }
}

/// For the log: an implicit request, or a poisoned page.
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
        // Only one flag is known, and a fault with others reaches no policy.
        flags: request.flags as u32,
        rip: request.rip,
        repeats: request.repeats,
    }
}

/// The flags that KVM_EXIT_MEMORY_FAULT would have.
fn implied_flags(access: State) -> u64 {
    match access {
        State::Private => FLAG_PRIVATE,
        State::Shared => 0,
    }
}
