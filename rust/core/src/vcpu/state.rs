//! One vCPU between runs: its registers, and what KVM still waits for.

use kvm_bindings::{KVM_SYNC_X86_REGS, kvm_regs, kvm_sregs};

use super::kick::Kick;
use crate::errno::Errno;
use crate::events::log::Writer;
use crate::hypervisor::exit::{Exit, decode, offset, put, u64_at};
use crate::hypervisor::vm::Vcpu;
use crate::memory::guest_memory::Pause;

/// For how many entries kvm_run carries the registers once an exit needed them.
const SYNC_FOR: u8 = 8;
/// Entries after which a reply that cannot be finished is given up: one per fragment of the longest access.
const FRAGMENTS: usize = 16;

pub(crate) struct VcpuState {
    pub index: u32,
    pub hv: Box<dyn Vcpu>,
    /// Its part of the log.
    pub log: Writer,
    /// `start` was called, and it did not end in a triple fault since.
    pub started: bool,
    /// An exit that was not answered yet.
    pub pending: Option<Exit>,
    /// The answer is in kvm_run; the next KVM_RUN takes it.
    pub reply_due: bool,
    /// Whether kvm_run can carry the general registers.
    can_sync: bool,
    /// Whether it carries those of the last exit. KVM copies them at every exit, so it is asked to only where exits need
    /// them; else they are an ioctl away.
    synced: bool,
    /// Entries left for which it is asked to, and one more for which it is told not to.
    sync_for: u8,
    /// As the CPU comes out of reset.
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
            pending: None,
            reply_due: false,
        })
    }

    /// One KVM_RUN, as soon as nobody holds vCPUs out of the guest: its result, and kvm_run.
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

    /// Has the coming exit's registers put into kvm_run, or not.
    fn sync(&mut self) {
        let wanted = self.sync_for > 1;
        self.sync_for -= 1;
        if wanted != self.synced {
            let valid = if wanted { u64::from(KVM_SYNC_X86_REGS) } else { 0 };
            put(self.hv.kvm_run(), offset::VALID_REGS, &valid.to_le_bytes());
            self.synced = wanted;
        }
    }

    /// Makes KVM take an answer that is due, without going on in the guest: its registers are then what the guest
    /// will see. An answer can lead to the next exit of the same instruction, which is kept.
    pub(crate) fn settle(&mut self, kick: &Kick, pause: Option<&Pause>) {
        if self.reply_due && self.pending.is_none() {
            kick.complete_only();
            let (result, kvm_run) = self.enter(kick, pause);
            let exit = decode(result, kvm_run);
            self.pending = exit.awaits_reply().then_some(exit);
        }
    }

    /// Drops whatever KVM waits for, for a vCPU that starts afresh.
    pub(crate) fn abandon(&mut self, kick: &Kick, pause: Option<&Pause>) {
        self.reply_due |= self.pending.take().is_some();
        for _ in 0..FRAGMENTS {
            self.settle(kick, pause);
            self.reply_due = self.pending.take().is_some();
            if !self.reply_due {
                break;
            }
        }
    }

    /// The instruction pointer at the last exit, or 0 where it cannot be had.
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

    /// Gives the guest an answer in RAX.
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
