//! Poisoned pages: KVM_RUN failed with EHWPOISON.

use super::implicit::{about, faulted};
use super::running::{Flow, LIVELOCK_BOUND, RunningVcpu, hook_failed};
use crate::errno::Errno;
use crate::error::Error;
use crate::events::event::{Kind, Outcome};
use crate::hypervisor::exit::MemoryFault;
use crate::policy::decision::Decision;
use crate::policy::request::ImplicitRequest;
use crate::policy::trial::{NOT_REMEMBERED_HERE, POISON_IS_NOT_CONVERTED};

pub(super) fn poison(vcpu: &mut RunningVcpu<'_>, fault: &MemoryFault) -> Result<Flow, Error> {
    vcpu.note_time();
    let (page, access) = faulted(vcpu, fault)?;
    let memory = vcpu.context.memory;
    let changes = memory.watch(vcpu.state.index, page.gpa());
    let repeats = vcpu.repeats(page, access, changes);
    let poison = ImplicitRequest {
        vcpu: vcpu.state.index,
        range: page,
        access,
        flags: fault.flags,
        errno: Errno(libc::EHWPOISON),
        state: memory.state(page.gpa()),
        rip: vcpu.rip(),
        executed: false,
        repeats,
        time: vcpu.exited,
        memory: *memory.views(),
    };
    vcpu.tally.poisons += 1;
    vcpu.open_request(&about(&poison, Kind::Poison));
    let decision = vcpu.context.policy.get(&mut vcpu.policy).memory_poison(&poison);
    let decision = vcpu.decided(decision, page, access)?;
    let site = vcpu.site(Some(page));
    match decision {
        Decision::Convert(_) => Err(hook_failed(site, POISON_IS_NOT_CONVERTED.into())),
        Decision::Remember(_) => Err(hook_failed(site, NOT_REMEMBERED_HERE.into())),
        Decision::Deny(errno) => {
            vcpu.tally.denied += 1;
            vcpu.close_as(Outcome::Denied, errno.0);
            Ok(Flow::Leave("denied".to_owned(), None))
        }
        Decision::Retry | Decision::Wait(_) if repeats >= LIVELOCK_BOUND => {
            Ok(Flow::Leave("livelock".to_owned(), None))
        }
        Decision::Retry | Decision::Wait(_) => {
            vcpu.tally.retries += 1;
            vcpu.close_as(Outcome::Retried, 0);
            vcpu.back_off(repeats);
            Ok(Flow::Resume)
        }
        Decision::Stop(reason) => {
            vcpu.close_as(Outcome::Stopped, 0);
            Ok(Flow::Leave(reason, None))
        }
        Decision::Discard if repeats >= LIVELOCK_BOUND => Err(vcpu.livelock(page, access, repeats)),
        Decision::Discard => {
            let what = "free the poisoned page";
            let discarded = memory.discard(page);
            discarded.map_err(|errno| Error::Host { what, errno })?;
            vcpu.close_as(Outcome::Discarded, 0);
            Ok(Flow::Resume)
        }
    }
}
