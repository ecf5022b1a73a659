//! Accesses that are private in a SEV guest although their address says shared: those without paging, and page walks
//! through tables without the C-bit. The page is opened for them for a time (`memory/unpaged.rs`); the log shows when, and
//! that it is over. No policy is asked: the guest does not ask for a conversion, and gets none.

use super::running::RunningVcpu;
use crate::error::Error;
use crate::events::event::{Asked, Kind, Outcome};
use crate::memory::address::{Range, State};

/// A vCPU whose RIP has any of these bits is in 64-bit mode, and so has paging.
const ONLY_PAGED: u64 = !0xffff_ffff;
/// The most rows of a vCPU's log about this: a guest can switch paging on and off as often as it likes, and its requests
/// are to stay in the log.
const MOST_ROWS: u32 = 1000;

/// What became of an access through the shared view of a private page.
pub(super) enum Unpaged {
    /// It is a request: the vCPU has paging.
    No,
    /// The page is open now.
    Opened,
    /// It was open already, so opening it does not help.
    WasOpen,
}

/// Opens the page for this access, if it is one without paging.
pub(super) fn open(vcpu: &mut RunningVcpu<'_>, page: Range) -> Result<Unpaged, Error> {
    let Some(sev) = vcpu.context.sev else {
        return Ok(Unpaged::No);
    };
    if vcpu.rip() & ONLY_PAGED != 0 {
        return Ok(Unpaged::No);
    }
    let sregs = vcpu.state.hv.sregs().map_err(|errno| vcpu.no_registers(errno))?;
    if sev.is_paged(&sregs) {
        return Ok(Unpaged::No);
    }
    let memory = vcpu.context.memory;
    if memory.is_open(page) {
        return Ok(Unpaged::WasOpen);
    }
    let opened = memory.open_unpaged(page, vcpu.state.index);
    let what = "open a page to a vCPU without paging";
    let opened = opened.map_err(|errno| Error::Host { what, errno })?;
    vcpu.set_unpaged(true);
    record_closed(vcpu);
    vcpu.tally.opened += opened.len() as u64;
    for range in opened {
        record(vcpu, range, Outcome::Opened);
    }
    Ok(Unpaged::Opened)
}

/// Closes what was opened for this vCPU, if it has paging by now.
#[cold]
pub(super) fn close_if_paged(vcpu: &mut RunningVcpu<'_>) -> Result<(), Error> {
    let Some(sev) = vcpu.context.sev else {
        return Ok(());
    };
    let sregs = vcpu.state.hv.sregs().map_err(|errno| vcpu.no_registers(errno))?;
    match sev.is_paged(&sregs) {
        true => close(vcpu),
        false => Ok(()),
    }
}

/// Closes what was opened for this vCPU.
pub(super) fn close(vcpu: &mut RunningVcpu<'_>) -> Result<(), Error> {
    let closed = vcpu.context.memory.close_unpaged(vcpu.state.index);
    let what = "close a page to vCPUs without paging";
    closed.map_err(|errno| Error::Host { what, errno })?;
    vcpu.set_unpaged(false);
    record_closed(vcpu);
    Ok(())
}

fn record_closed(vcpu: &mut RunningVcpu<'_>) {
    for range in vcpu.context.memory.take_closed(vcpu.state.index) {
        record(vcpu, range, Outcome::Closed);
    }
}

fn record(vcpu: &mut RunningVcpu<'_>, range: Range, outcome: Outcome) {
    if vcpu.state.unpaged_rows == MOST_ROWS {
        return;
    }
    vcpu.state.unpaged_rows += 1;
    vcpu.note_time();
    let asked = Asked {
        time: vcpu.exited,
        kind: Kind::Unpaged,
        gpa: range.gpa(),
        size: range.size(),
        to: State::Private,
        state: Some(State::Private),
        page_size: 0,
        raw: 0,
        flags: 0,
        rip: vcpu.rip(),
        repeats: 0,
    };
    vcpu.record_other(&asked, outcome, 0);
}
