//! One vCPU between runs: its registers, and what KVM still waits for.

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::decode::{self, Exit, decode, offset};
use crate::errno::Errno;
use crate::hypervisor::Vcpu;
use crate::kick::Kick;
use crate::world::World;

/// Entries after which a reply that cannot be finished is given up: one per fragment of the longest access.
const FRAGMENTS: usize = 16;

#[repr(align(128))]
pub(crate) struct VcpuState {
    pub index: u32,
    pub hv: Box<dyn Vcpu>,
    /// `start` was called, and it did not end in a triple fault since.
    pub started: bool,
    /// An exit that was not answered yet.
    pub pending: Option<Exit>,
    /// The answer is in the run page; the next KVM_RUN takes it.
    pub reply_due: bool,
    /// As the CPU comes out of reset.
    pub reset_sregs: kvm_sregs,
}

impl VcpuState {
    pub(crate) fn new(index: u32, hv: Box<dyn Vcpu>) -> Result<Self, Errno> {
        Ok(Self {
            index,
            reset_sregs: hv.sregs()?,
            hv,
            started: false,
            pending: None,
            reply_due: false,
        })
    }

    /// One KVM_RUN.
    pub(crate) fn enter(&mut self, kick: &Kick) -> Exit {
        decode::put(self.hv.page(), offset::EXIT_REASON, &decode::SENTINEL.to_le_bytes());
        self.reply_due = false;
        let result = kick.inside(|| self.hv.run());
        decode(result, self.hv.page())
    }

    /// Makes KVM take an answer that is due, without going on in the guest: its registers are then what the guest
    /// will see. An answer can lead to the next exit of the same instruction, which is kept.
    pub(crate) fn settle(&mut self, kick: &Kick, world: Option<&World>) {
        if self.reply_due && self.pending.is_none() {
            let _inside = world.map(World::enter);
            kick.complete_only();
            let exit = self.enter(kick);
            self.pending = exit.awaits_reply().then_some(exit);
        }
    }

    /// Drops whatever KVM waits for, for a vCPU that starts afresh.
    pub(crate) fn abandon(&mut self, kick: &Kick, world: Option<&World>) {
        self.reply_due |= self.pending.take().is_some();
        for _ in 0..FRAGMENTS {
            self.settle(kick, world);
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
        if !self.hv.syncs_regs() {
            return self.hv.regs();
        }
        let page = self.hv.page();
        let at = |index: usize| decode::u64_at(page, offset::REGS + index * 8).unwrap_or_default();
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
        if !self.hv.syncs_regs() {
            let mut regs = self.hv.regs()?;
            regs.rax = rax;
            return self.hv.set_regs(&regs);
        }
        let page = self.hv.page();
        decode::put(page, offset::REGS, &rax.to_le_bytes());
        let dirty = u64::from(kvm_bindings::KVM_SYNC_X86_REGS);
        decode::put(page, offset::DIRTY_REGS, &dirty.to_le_bytes());
        Ok(())
    }
}
