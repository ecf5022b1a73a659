//! One vCPU's state that lasts from run to run: its registers, and an exit that is not answered yet.

use kvm_bindings::{KVM_SYNC_X86_REGS, kvm_regs, kvm_sregs};

use super::kick::Kick;
use crate::errno::Errno;
use crate::events::log::Writer;
use crate::hypervisor::exit::{Exit, Mmio, decode, offset, put, u64_at};
use crate::hypervisor::vm::Vcpu;
use crate::memory::guest_memory::Pause;

/// Entries for which KVM copies the registers into kvm_run after an exit needed them.
const SYNC_FOR: u8 = 8;
/// KVM exits once for each fragment of an access, and the longest has this many.
pub(super) const FRAGMENTS: usize = 16;

/// Memory that KVM reads for an instruction, an exit for each fragment.
pub(super) struct Reading {
    pub first: Mmio,
    /// The registers before the instruction.
    pub regs: kvm_regs,
}

pub(crate) struct VcpuState {
    pub index: u32,
    pub hv: Box<dyn Vcpu>,
    /// Its part of the log.
    pub log: Writer,
    /// `start` was called, and the vCPU has not triple-faulted since.
    pub started: bool,
    /// It executed HLT, with no interrupt controller that could wake it.
    pub halted: bool,
    /// An exit that was not answered yet.
    pub pending: Option<Exit>,
    /// The answer is in kvm_run, and KVM takes it at the next KVM_RUN.
    pub reply_due: bool,
    /// What `pending` goes on to read.
    pub(super) reading: Option<Reading>,
    /// Pages are open for it because it had no paging.
    pub unpaged: bool,
    /// How many rows of the log are about that.
    pub unpaged_rows: u32,
    /// Whether KVM can copy the general registers to and from kvm_run (KVM_CAP_SYNC_REGS).
    can_sync: bool,
    /// Whether kvm_run has the registers of the last exit. KVM would copy them at every exit, so this is on only while
    /// exits need them; otherwise KVM_GET_REGS reads them.
    synced: bool,
    /// Entries left with the copy on, plus one, at which it is turned off.
    sync_for: u8,
    /// The special registers after reset.
    pub reset_sregs: kvm_sregs,
}

impl VcpuState {
    pub(crate) fn new(index: u32, hv: Box<dyn Vcpu>, log: Writer) -> Result<Self, Errno> {
        Ok(Self {
            index,
            reset_sregs: hv.sregs()?,
            can_sync: hv.syncs_regs(),
            synced: false,
            sync_for: 0,
            hv,
            log,
            started: false,
            halted: false,
            pending: None,
            reply_due: false,
            reading: None,
            unpaged: false,
            unpaged_rows: 0,
        })
    }

    /// One KVM_RUN, after any pause is over. Returns its result, and kvm_run.
    #[inline(always)]
    pub(crate) fn enter(&mut self, kick: &Kick, pause: Option<&Pause>) -> (Result<(), Errno>, &mut [u8]) {
        let _in_guest = pause.map(Pause::enter);
        self.reply_due = false;
        if self.sync_for > 0 {
            self.sync();
        }
        let mut errno = Errno(0);
        let kvm_run = kick.inside(|| self.hv.enter(&mut errno));
        let result = match errno {
            Errno(0) => Ok(()),
            errno => Err(errno),
        };
        (result, kvm_run)
    }

    /// Turns the copy of registers into kvm_run on or off for the next exit.
    fn sync(&mut self) {
        let wanted = self.sync_for > 1;
        self.sync_for -= 1;
        if wanted != self.synced {
            let valid = if wanted { u64::from(KVM_SYNC_X86_REGS) } else { 0 };
            put(self.hv.kvm_run(), offset::VALID_REGS, &valid.to_le_bytes());
            self.synced = wanted;
        }
    }

    /// Makes KVM take an answer that is due, without entering the guest, so that the registers can be read as the guest
    /// will see them. The same instruction may cause another exit then; it is kept in `pending`.
    pub(crate) fn settle(&mut self, kick: &Kick, pause: Option<&Pause>) {
        if self.reply_due && self.pending.is_none() {
            kick.complete_only();
            let (result, kvm_run) = self.enter(kick, pause);
            let exit = decode(result, kvm_run);
            self.pending = exit.awaits_reply().then_some(exit);
        }
    }

    /// Completes any access that KVM waits for with whatever is in kvm_run, for a vCPU that is started anew.
    pub(crate) fn abandon(&mut self, kick: &Kick, pause: Option<&Pause>) {
        self.reading = None;
        self.reply_due |= self.pending.take().is_some();
        for _ in 0..FRAGMENTS {
            self.settle(kick, pause);
            self.reply_due = self.pending.take().is_some();
            if !self.reply_due {
                break;
            }
        }
    }

    /// The instruction pointer at the last exit, or 0 if it cannot be read.
    pub(crate) fn rip(&mut self) -> u64 {
        self.regs().map_or(0, |regs| regs.rip)
    }

    /// The general registers at the last exit.
    pub(crate) fn regs(&mut self) -> Result<kvm_regs, Errno> {
        if self.can_sync {
            self.sync_for = SYNC_FOR + 1;
        }
        if !self.synced {
            return self.hv.regs();
        }
        let kvm_run = self.hv.kvm_run();
        let at = |index: usize| u64_at(kvm_run, offset::REGS + index * 8).unwrap_or_default();
        // In the order of struct kvm_regs.
        Ok(kvm_regs {
            rax: at(0),
            rbx: at(1),
            rcx: at(2),
            rdx: at(3),
            rsi: at(4),
            rdi: at(5),
            rsp: at(6),
            rbp: at(7),
            r8: at(8),
            r9: at(9),
            r10: at(10),
            r11: at(11),
            r12: at(12),
            r13: at(13),
            r14: at(14),
            r15: at(15),
            rip: at(16),
            rflags: at(17),
        })
    }

    /// Sets RAX, for the answer to a doorbell.
    pub(crate) fn answer(&mut self, rax: u64) -> Result<(), Errno> {
        if !self.synced {
            let mut regs = self.hv.regs()?;
            regs.rax = rax;
            return self.hv.set_regs(&regs);
        }
        let kvm_run = self.hv.kvm_run();
        put(kvm_run, offset::RAX, &rax.to_le_bytes());
        put(kvm_run, offset::DIRTY_REGS, &u64::from(KVM_SYNC_X86_REGS).to_le_bytes());
        Ok(())
    }
}
