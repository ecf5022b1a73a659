//! Explicit requests: KVM_HC_MAP_GPA_RANGE, by hypercall or by the doorbell.

use super::request::conversion_failed;
use super::running::{RunningVcpu, hook_failed};
use crate::errno::Errno;
use crate::error::{ConvertError, Error, Failure, Site};
use crate::events::event::{Asked, Kind, Outcome};
use crate::hypervisor::exit::{Hypercall, offset, put};
use crate::hypervisor::hypercall::{KVM_ENOSYS, KVM_HC_MAP_GPA_RANGE, KVM_MAP_GPA_RANGE_ENCRYPTED};
use crate::memory::address::{PAGE_SIZE, State};
use crate::memory::conversion::{Condition, Converted, Order, Progress};
use crate::policy::decision::Decision;
use crate::policy::map_gpa_range::{MapGpaRange, parse};
use crate::policy::request::{ExplicitRequest, Request};
use crate::policy::trial::DISCARD_IS_FOR_POISON;

/// How often the policy is asked again at most when the pages of its request change while it decides.
const ASKED_AGAIN_BOUND: u32 = 16;

/// The hypercall. The answer is written to kvm_run, and KVM puts it into RAX at the next KVM_RUN.
#[inline]
pub(super) fn hypercall(vcpu: &mut RunningVcpu<'_>, call: &Hypercall) -> Result<(), Error> {
    let answer = request(vcpu, call)?.to_le_bytes();
    put(vcpu.state.hv.kvm_run(), offset::HYPERCALL_RET, &answer);
    vcpu.state.reply_due = true;
    Ok(())
}

/// The same request by a write to the doorbell's port: the same registers, and the answer is written to RAX.
pub(super) fn doorbell(vcpu: &mut RunningVcpu<'_>) -> Result<(), Error> {
    let regs = vcpu.state.regs().map_err(|errno| vcpu.no_registers(errno))?;
    let call = Hypercall {
        nr: regs.rax,
        args: [regs.rbx, regs.rcx, regs.rdx],
    };
    let answer = request(vcpu, &call)?;
    let answered = vcpu.state.answer(answer as u64);
    answered.map_err(|errno| vcpu.no_registers(errno))?;
    vcpu.state.reply_due = true;
    Ok(())
}

/// The value for RAX: 0 or a positive errno; -KVM_ENOSYS for any other hypercall.
fn request(vcpu: &mut RunningVcpu<'_>, call: &Hypercall) -> Result<i64, Error> {
    vcpu.note_time();
    if call.nr != KVM_HC_MAP_GPA_RANGE {
        vcpu.tally.malformed += 1;
        return Ok(-KVM_ENOSYS);
    }
    let wanted = match parse(call, vcpu.context.memory.views()) {
        Ok(Some(wanted)) => wanted,
        Ok(None) => return Ok(0),
        Err(errno) => {
            malformed(vcpu, call, errno);
            return Ok(errno.0.into());
        }
    };
    vcpu.tally.hypercalls += 1;
    let mut asked_again = 0;
    loop {
        if let Some(errno) = judge(vcpu, &wanted)? {
            return Ok(errno.into());
        }
        if asked_again == ASKED_AGAIN_BOUND || vcpu.context.control.leaving() {
            break;
        }
        // The pages changed while the policy decided, so it is asked again. This is still one request: the log gets one
        // row, with the last decision.
        asked_again += 1;
        vcpu.state.log.forget();
    }
    vcpu.tally.retries += 1;
    vcpu.close_as(Outcome::Retried, libc::EAGAIN);
    Ok(libc::EAGAIN.into())
}

/// Counts and logs a request that reaches no policy. Its row has what the guest gave, as far as the columns hold it.
#[cold]
fn malformed(vcpu: &mut RunningVcpu<'_>, call: &Hypercall, errno: Errno) {
    vcpu.tally.malformed += 1;
    let [gpa, pages, raw] = call.args;
    let to = match raw & KVM_MAP_GPA_RANGE_ENCRYPTED {
        0 => State::Shared,
        _ => State::Private,
    };
    let rip = if vcpu.context.is_pc { vcpu.rip() } else { 0 };
    vcpu.close_request();
    let index = vcpu.state.index;
    vcpu.context.events.malformed(
        index,
        &Asked {
            time: vcpu.exited,
            kind: Kind::Malformed,
            gpa,
            size: pages.saturating_mul(PAGE_SIZE),
            to,
            state: None,
            page_size: 0,
            raw: u32::try_from(raw).unwrap_or(u32::MAX),
            flags: 0,
            rip,
            repeats: 0,
        },
        errno,
    );
}

/// The errno for the guest, 0 for success; `None` if the pages are no longer in the states that the policy was told.
#[inline]
fn judge(vcpu: &mut RunningVcpu<'_>, wanted: &MapGpaRange) -> Result<Option<i32>, Error> {
    let seen = vcpu.context.memory.see(wanted.range);
    let request = ExplicitRequest {
        vcpu: vcpu.state.index,
        range: wanted.range,
        to: wanted.to,
        page_size: wanted.page_size,
        raw: wanted.raw,
        state: seen.state,
        time: vcpu.exited,
        memory: *vcpu.context.memory.views(),
    };
    let rip = if vcpu.context.is_pc { vcpu.rip() } else { 0 };
    vcpu.open_request(&about(&request, rip));
    let decision = vcpu.context.policy.get(&mut vcpu.policy).map_gpa_range(&request);
    // By reference: a copy of it is some of what a request costs.
    let Ok(Decision::Convert(convert)) = &decision else {
        return not_converted(vcpu, decision, &request).map(Some);
    };
    let (mut order, as_asked) = match vcpu.order(convert, Request::Explicit(&request)) {
        Ok(order) => order,
        Err(failure) => return Err(hook_failed(site(vcpu, &request), failure)),
    };
    match vcpu.carry_out(
        convert,
        (&mut order, as_asked),
        Condition::AsTold(&seen),
        Request::Explicit(&request),
    ) {
        Ok(Converted::Superseded) => Ok(None),
        Ok(converted) => {
            let errno = vcpu.converted(&order, converted);
            if convert.prefault && matches!(converted, Converted::Done { .. }) {
                vcpu.prefault(order.range, order.to);
            }
            Ok(Some(errno))
        }
        Err(source) => refused(vcpu, source, &request, &order).map(Some),
    }
}

/// Any decision but Convert: the errno for the guest.
fn not_converted(
    vcpu: &mut RunningVcpu<'_>,
    decision: Result<Decision, Failure>,
    request: &ExplicitRequest,
) -> Result<i32, Error> {
    match vcpu.decided(decision, request.range, request.to)? {
        Decision::Deny(errno) => {
            vcpu.tally.denied += 1;
            vcpu.close_as(Outcome::Denied, errno.0);
            Ok(errno.0)
        }
        Decision::Retry | Decision::Wait(_) => {
            vcpu.tally.retries += 1;
            vcpu.close_as(Outcome::Retried, libc::EAGAIN);
            Ok(libc::EAGAIN)
        }
        // Nothing was converted: EAGAIN makes a guest that is resumed later ask again.
        Decision::Stop(reason) => {
            vcpu.close_as(Outcome::Stopped, libc::EAGAIN);
            vcpu.context.control.finish_at(reason, vcpu.whereabouts());
            Ok(libc::EAGAIN)
        }
        Decision::Discard | Decision::Convert(_) | Decision::Remember(_) => {
            Err(hook_failed(site(vcpu, request), DISCARD_IS_FOR_POISON.into()))
        }
    }
}

/// A conversion that failed: the errno for the guest, or an error if the run cannot go on.
#[cold]
fn refused(
    vcpu: &mut RunningVcpu<'_>,
    source: ConvertError,
    request: &ExplicitRequest,
    order: &Order,
) -> Result<i32, Error> {
    if matches!(source, ConvertError::OverQuota { .. }) {
        vcpu.over_quota();
        return Ok(libc::EINVAL);
    }
    let (progress, errno) = (Progress::before(&source), source.guest_errno());
    let outcome = match (&source, errno) {
        (ConvertError::Partly { .. }, Some(_)) => {
            vcpu.tally.retries += 1;
            Outcome::Retried
        }
        _ => Outcome::Failed,
    };
    vcpu.close_with(order, progress, outcome, errno.map_or(0, |errno| errno.0));
    match errno {
        Some(errno) => Ok(errno.0),
        None => Err(conversion_failed(site(vcpu, request), source)),
    }
}

/// Where the request was made, with the state that its pages were in.
fn site(vcpu: &mut RunningVcpu<'_>, request: &ExplicitRequest) -> Site {
    Site {
        vcpu: request.vcpu,
        gpa: Some(request.range.gpa()),
        state: Some(request.state.map_or("mixed", State::as_str)),
        rip: vcpu.rip(),
        symbol: None,
    }
}

/// The request as it is logged.
#[inline]
fn about(request: &ExplicitRequest, rip: u64) -> Asked {
    Asked {
        time: request.time,
        kind: Kind::Explicit,
        gpa: request.range.gpa(),
        size: request.range.size(),
        to: request.to,
        state: request.state,
        // Neither cast truncates: the parser accepts hints up to 1 GiB, and attributes of five bits.
        page_size: request.page_size as u32,
        raw: request.raw as u32,
        flags: 0,
        rip,
        repeats: 0,
    }
}
