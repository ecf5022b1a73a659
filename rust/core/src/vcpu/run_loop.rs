//! The loop of a vCPU: enter the guest, dispatch the exit, resume.

use super::asker::{self, Asker};
use super::frequent::{self, Left};
use super::kick::Kick;
use super::running::{Context, Flow, LONGEST_WAIT, RunningVcpu};
use super::state::VcpuState;
use super::tally::Tally;
use super::{device_io, explicit, halted, implicit, msr, poison, unpaged};
use crate::errno::Errno;
use crate::error::Error;
use crate::hypervisor::exit::{Exit, SENTINEL};
use crate::hypervisor::hypercall::DOORBELL_PORT;

/// The run fails after this many EAGAIN or ENOMEM in a row from KVM_RUN.
const KVM_RUN_BOUND: u32 = 1000;

/// Runs one vCPU until it or the run ends, and adds to its counts.
pub(crate) fn run(context: Context<'_>, asker: Asker, state: &mut VcpuState, kick: &Kick, tally: &mut Tally) {
    let _asks = asker::runs(asker);
    let mut vcpu = RunningVcpu::new(context, state, kick, tally);
    let mut refused = 0;
    while !vcpu.must_leave() {
        let left = match vcpu.state.pending.take() {
            Some(exit) => Left::Exit(exit),
            None => frequent::run(&mut vcpu, &mut refused),
        };
        let goes_on = match left {
            Left::RunEnds => false,
            Left::Failed(exit, error) => resume(&mut vcpu, &exit, Err(error)),
            Left::Exit(exit) => {
                let handled = dispatch(&mut vcpu, &exit, &mut refused);
                resume(&mut vcpu, &exit, handled)
            }
        };
        if !goes_on {
            break;
        }
    }
    vcpu.close_request();
    vcpu.state.settle(kick, context.memory.pause());
}

/// `refused`: how often KVM_RUN failed with EAGAIN or ENOMEM in a row.
fn dispatch(vcpu: &mut RunningVcpu<'_>, exit: &Exit, refused: &mut u32) -> Result<Flow, Error> {
    match exit {
        Exit::TryAgain | Exit::OutOfMemory => *refused += 1,
        _ => *refused = 0,
    }
    if vcpu.state.unpaged {
        unpaged::close_if_paged(vcpu)?;
    }
    match exit {
        Exit::Hypercall(call) => explicit::hypercall(vcpu, call).map(|()| Flow::Resume),
        Exit::Io(io) if io.port == DOORBELL_PORT && io.write && io.len() == 1 => {
            explicit::doorbell(vcpu).map(|()| Flow::Resume)
        }
        Exit::Io(io) => device_io::port_io(vcpu, io).map(|()| Flow::Resume),
        Exit::Mmio(mmio) => match implicit::in_memory(vcpu, mmio) {
            Some(place) => implicit::emulated_access(vcpu, mmio, place),
            None => device_io::mmio(vcpu, mmio).map(|()| Flow::Resume),
        },
        Exit::MemoryFault(fault) => implicit::memory_fault(vcpu, fault),
        Exit::Poison(fault) => poison::poison(vcpu, fault),
        Exit::InternalError { suberror } => implicit::internal_error(vcpu, *suberror),
        Exit::ReadMsr { index } => {
            msr::read(vcpu, *index);
            Ok(Flow::Resume)
        }
        Exit::WriteMsr { index, .. } => {
            msr::write(vcpu, *index);
            Ok(Flow::Resume)
        }
        Exit::Interrupted => {
            halted::look(vcpu);
            Ok(Flow::Resume)
        }
        Exit::SetTpr => Ok(Flow::Resume),
        Exit::TryAgain if vcpu.waits_for_init() => {
            // A guest's SIPI or NMI to a vCPU that had no INIT: not an error, however often it comes.
            *refused = 0;
            vcpu.context.control.pause(LONGEST_WAIT);
            Ok(Flow::Resume)
        }
        Exit::TryAgain => try_again(vcpu, Errno(libc::EAGAIN), *refused),
        Exit::OutOfMemory => try_again(vcpu, Errno(libc::ENOMEM), *refused),
        Exit::Halt => Ok(Flow::Halt),
        Exit::Shutdown => {
            unpaged::close(vcpu)?;
            Ok(Flow::Shutdown)
        }
        Exit::BadBacking => Err(bad_backing(vcpu)),
        Exit::Failed(errno) => Err(vcpu.failed(format!("KVM_RUN failed with {errno}"))),
        Exit::FailEntry { reason } => Err(vcpu.failed(format!(
            "the CPU refused to enter the guest, hardware reason {reason:#x}"
        ))),
        Exit::SystemEvent { kind } => Err(vcpu.failed(format!("KVM reported system event {kind}"))),
        Exit::Unknown { reason: SENTINEL } => Err(vcpu.failed("KVM_RUN returned without an exit reason".to_owned())),
        Exit::Unknown { reason } => Err(vcpu.failed(format!("exit reason {reason} is not one this core handles"))),
    }
}

/// Does what the exit's handling asks for; returns whether this vCPU goes on.
fn resume(vcpu: &mut RunningVcpu<'_>, exit: &Exit, handled: Result<Flow, Error>) -> bool {
    let control = vcpu.context.control;
    match handled {
        Ok(Flow::Resume) => {}
        Ok(Flow::Postpone(exit)) => vcpu.state.pending = Some(exit),
        Ok(Flow::Leave(reason, pending)) => {
            let at = vcpu.whereabouts();
            vcpu.state.pending = pending;
            control.finish_at(reason, at);
        }
        Ok(Flow::Halt) => {
            vcpu.state.halted = true;
            control.halted();
            return false;
        }
        Ok(Flow::Shutdown) => {
            vcpu.state.started = false;
            control.finish_at("shutdown".to_owned(), vcpu.whereabouts());
        }
        Err(mut error) => {
            if let Some(site) = error.site_mut() {
                site.symbol = asker::asker().and_then(|asker| asker.symbol(&mut || Ok(())).unwrap_or_default());
            }
            if exit.awaits_reply() {
                // It was not answered, so the next run starts with it.
                vcpu.state.pending = Some(*exit);
                vcpu.state.reply_due = false;
            }
            control.finish(Err(error));
        }
    }
    true
}

fn try_again(vcpu: &mut RunningVcpu<'_>, errno: Errno, times: u32) -> Result<Flow, Error> {
    if times > KVM_RUN_BOUND {
        return Err(vcpu.failed(format!("KVM_RUN failed with {errno} {times} times in a row")));
    }
    vcpu.back_off(times);
    Ok(Flow::Resume)
}

fn bad_backing(vcpu: &mut RunningVcpu<'_>) -> Error {
    let slot = vcpu.context.memory.describe_slots();
    Error::BadBacking {
        site: vcpu.site(None),
        slot,
    }
}
