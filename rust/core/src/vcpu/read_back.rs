//! Instructions that read memory and write back what they make of it, where KVM emulates the access: it exits for the read,
//! and then for the write. What others wrote in between would be lost, also where the instruction is a locked one.
//!
//! So such an instruction is taken back after the read, by which its page has come into the accessed state, and the guest
//! executes it again: natively, as one access.
//!
//! That is done again as often as others convert the page in between, each time on a request of theirs that the policy
//! has allowed. If nobody does and KVM still emulates the instruction, it is a livelock.

use super::running::{LIVELOCK_BOUND, RunningVcpu};
use super::state::{FRAGMENTS, Reading};
use crate::error::Error;
use crate::hypervisor::exit::{Exit, Mmio};
use crate::memory::address::{Range, State};
use crate::memory::guest_memory::{FaultStatus, FaultingAccess};

/// KVM emulates a read of `page`. An error if the instruction was taken back many times after this same read, and the page
/// did not change in between.
pub(super) fn begin(vcpu: &mut RunningVcpu<'_>, read: &Mmio, page: Range, access: State) -> Result<(), Error> {
    let again = vcpu.taken_back.take().map(|first| (first.gpa, first.len));
    if again != Some((read.gpa, read.len)) {
        return Ok(());
    }
    let entry = vcpu.entry;
    let fault = FaultingAccess { page, access, entry };
    let (status, changes) = vcpu.context.memory.examine(&fault, vcpu.state.index);
    if status != FaultStatus::Unexplained {
        return Ok(());
    }
    let repeats = vcpu.repeats(page, access, changes);
    if repeats >= LIVELOCK_BOUND {
        return Err(vcpu.livelock(page, access, repeats));
    }
    vcpu.back_off(repeats);
    Ok(())
}

/// Has KVM take the bytes that were read, without entering the guest. If the instruction writes them back, takes the
/// instruction back.
pub(super) fn finish(vcpu: &mut RunningVcpu<'_>, read: &Mmio) -> Result<(), Error> {
    let regs = vcpu.state.regs().map_err(|errno| vcpu.no_registers(errno))?;
    let new = Reading { first: *read, regs };
    let begun = vcpu.state.reading.take().filter(|begun| begun.regs == regs);
    let reading = begun.unwrap_or(new);
    settle(vcpu);
    match vcpu.state.pending {
        Some(Exit::Mmio(next)) if !next.write => vcpu.state.reading = Some(reading),
        Some(Exit::Mmio(next)) if (next.gpa, next.len) == (reading.first.gpa, reading.first.len) => {
            for _ in 0..FRAGMENTS {
                if !matches!(vcpu.state.pending, Some(Exit::Mmio(next)) if next.write) {
                    break;
                }
                // KVM forgets a write that was not done.
                vcpu.state.pending = None;
                vcpu.state.reply_due = true;
                settle(vcpu);
            }
            let taken_back = vcpu.state.hv.set_regs(&reading.regs);
            taken_back.map_err(|errno| vcpu.no_registers(errno))?;
            vcpu.taken_back = Some(reading.first);
        }
        _ => {}
    }
    Ok(())
}

fn settle(vcpu: &mut RunningVcpu<'_>) {
    vcpu.entry = vcpu.context.memory.entry();
    vcpu.state.settle(vcpu.kick, vcpu.context.memory.pause());
}
