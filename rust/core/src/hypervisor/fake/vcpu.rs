//! The vCPU of the fake: each KVM_RUN executes its script up to the next exit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_MEMORY_EXIT_FLAG_PRIVATE, Xsave, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use parking_lot::Mutex;

use super::kernel::{CallName, Kernel};
use super::script::{Reply, Step};
use crate::errno::Errno;
use crate::hypervisor::exit::{START, offset, put, u64_at};
use crate::hypervisor::hypercall::DOORBELL_PORT;
use crate::hypervisor::vm::{ImmediateExit, Vcpu};

const PAGE_SIZE: u64 = 4096;
/// The size of kvm_run in bytes: two pages, the second for the data of port IO.
const KVM_RUN_LEN: usize = 2 * 4096;
const IO_DATA: usize = 4096;

#[derive(Default)]
struct FakeImmediateExit(AtomicU8);

impl ImmediateExit for FakeImmediateExit {
    fn byte(&self) -> &AtomicU8 {
        &self.0
    }
}

/// Where in kvm_run or in the registers the answer to a step will be.
#[derive(Clone, Copy)]
enum ReplyTo {
    HypercallRet,
    Rax,
    Mmio,
    Io(usize),
    /// A store or OUT, which gets no answer.
    Nothing,
}

/// The state that KVM_GET_* and KVM_SET_* access. It has no effect on the script.
struct Registers {
    regs: kvm_regs,
    sregs: kvm_sregs,
    cpuid: CpuId,
    msrs: BTreeMap<u32, u64>,
    lapic: kvm_lapic_state,
    xsave: Xsave,
    xcrs: kvm_xcrs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    debug_regs: kvm_debugregs,
}

pub(super) struct FakeVcpu {
    kernel: Arc<Kernel>,
    steps: Vec<Step>,
    /// How often the script is still to be executed, with the present time.
    cycles: u64,
    /// The step to execute next.
    next: usize,
    awaiting: Option<ReplyTo>,
    replies: Arc<Mutex<Vec<Reply>>>,
    kvm_run: [u8; KVM_RUN_LEN - START],
    immediate_exit: Arc<FakeImmediateExit>,
    state: Registers,
}

impl FakeVcpu {
    pub(super) fn new(kernel: Arc<Kernel>, steps: Vec<Step>, cycles: u64, replies: Arc<Mutex<Vec<Reply>>>) -> Self {
        Self {
            kernel,
            steps,
            cycles,
            next: 0,
            awaiting: None,
            replies,
            kvm_run: [0; KVM_RUN_LEN - START],
            immediate_exit: Arc::default(),
            state: Registers::default(),
        }
    }

    fn advance(&mut self) {
        self.next += 1;
        if self.next >= self.steps.len() && self.cycles > 1 {
            self.cycles -= 1;
            self.next = 0;
        }
        // A guest's instruction pointer moves too.
        self.state.regs.rip += 1;
    }

    /// Takes the answer to the last exit, which KVM_RUN does before anything else.
    fn complete(&mut self) {
        let Some(answer) = self.awaiting.take() else {
            return;
        };
        let word = |at| u64_at(&self.kvm_run, at).unwrap_or_default().to_le_bytes().to_vec();
        let value = match answer {
            ReplyTo::HypercallRet => word(offset::HYPERCALL_RET),
            ReplyTo::Rax => self.state.regs.rax.to_le_bytes().to_vec(),
            ReplyTo::Mmio => word(offset::MMIO_DATA),
            ReplyTo::Io(len) => {
                let start = IO_DATA - START;
                self.kvm_run.get(start..start + len).unwrap_or_default().to_vec()
            }
            ReplyTo::Nothing => Vec::new(),
        };
        if self.cycles <= 1 {
            self.replies.lock().push(Reply { step: self.next, value });
        }
        self.advance();
    }

    fn exit(&mut self, reason: u32, words: [u64; 3]) {
        put(&mut self.kvm_run, offset::EXIT_REASON, &reason.to_le_bytes());
        for (i, word) in words.iter().enumerate() {
            put(&mut self.kvm_run, offset::UNION + i * 8, &word.to_le_bytes());
        }
    }

    fn await_reply(&mut self, answer: ReplyTo, reason: u32, words: [u64; 3]) -> Option<Result<(), Errno>> {
        self.awaiting = Some(answer);
        self.exit(reason, words);
        Some(Ok(()))
    }

    /// Executes one step: `None` where it does not leave the guest.
    fn step(&mut self) -> Option<Result<(), Errno>> {
        let step = self.steps.get(self.next).cloned().unwrap_or(Step::Halt);
        match step {
            Step::Fail(errno) => {
                self.advance();
                Some(Err(Errno(errno)))
            }
            Step::Exit { errno, reason, words } => {
                self.advance();
                self.exit(reason, words);
                Some(if errno == 0 { Ok(()) } else { Err(Errno(errno)) })
            }
            Step::Access { gpa, write } => self.access(gpa, write),
            Step::Hypercall([nr, gpa, pages, attributes]) => {
                put(&mut self.kvm_run, offset::UNION + 24, &attributes.to_le_bytes());
                // Old kernels leave an old value here, so the core has to write its answer even if that is 0.
                put(&mut self.kvm_run, offset::HYPERCALL_RET, &u64::MAX.to_le_bytes());
                self.await_reply(ReplyTo::HypercallRet, KVM_EXIT_HYPERCALL, [nr, gpa, pages])
            }
            Step::Doorbell([rax, rbx, rcx, rdx]) => {
                self.state.regs = kvm_regs {
                    rax,
                    rbx,
                    rcx,
                    rdx,
                    ..self.state.regs
                };
                let io = io_words(DOORBELL_PORT, true, 1, 1);
                self.await_reply(ReplyTo::Rax, KVM_EXIT_IO, io)
            }
            Step::Io {
                port,
                write,
                size,
                data,
            } => {
                put(&mut self.kvm_run, IO_DATA - START, &data);
                let count = data.len() / usize::from(size.max(1));
                let answer = if write {
                    ReplyTo::Nothing
                } else {
                    ReplyTo::Io(data.len())
                };
                self.await_reply(answer, KVM_EXIT_IO, io_words(port, write, size, count as u32))
            }
            Step::Block => {
                while self.immediate_exit.0.load(Ordering::SeqCst) == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                self.advance();
                Some(Err(Errno(libc::EINTR)))
            }
            Step::Halt => {
                self.advance();
                self.exit(KVM_EXIT_HLT, [0; 3]);
                Some(Ok(()))
            }
            Step::Shutdown => {
                self.advance();
                self.exit(KVM_EXIT_SHUTDOWN, [0; 3]);
                Some(Ok(()))
            }
            Step::InternalError(suberror) => {
                self.advance();
                self.exit(KVM_EXIT_INTERNAL_ERROR, [suberror.into(), 0, 0]);
                Some(Ok(()))
            }
        }
    }

    fn access(&mut self, gpa: u64, write: bool) -> Option<Result<(), Errno>> {
        let private = self.kernel.is_private(gpa);
        let slot = self.kernel.slot_at(gpa);
        match (private, slot) {
            (true, Some(true)) | (false, Some(_)) => {
                self.advance();
                None
            }
            (true, _) => {
                let page = gpa & !(PAGE_SIZE - 1);
                self.exit(
                    KVM_EXIT_MEMORY_FAULT,
                    [KVM_MEMORY_EXIT_FLAG_PRIVATE.into(), page, PAGE_SIZE],
                );
                Some(Err(Errno(libc::EFAULT)))
            }
            (false, None) => {
                let answer = if write { ReplyTo::Nothing } else { ReplyTo::Mmio };
                let len_and_write = 8 | u64::from(write) << 32;
                self.await_reply(answer, KVM_EXIT_MMIO, [gpa, 0x1122_3344_5566_7788, len_and_write])
            }
        }
    }
}

fn io_words(port: u16, write: bool, size: u8, count: u32) -> [u64; 3] {
    let head = u64::from(write) | u64::from(size) << 8 | u64::from(port) << 16 | u64::from(count) << 32;
    [head, IO_DATA as u64, 0]
}

impl Default for Registers {
    fn default() -> Self {
        #[expect(clippy::expect_used, reason = "a length of 0 is allowed")]
        Self {
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            cpuid: CpuId::new(0).expect("an empty list"),
            msrs: BTreeMap::new(),
            lapic: kvm_lapic_state::default(),
            xsave: Xsave::new(0).expect("no part beyond the fixed one"),
            xcrs: kvm_xcrs::default(),
            events: kvm_vcpu_events::default(),
            mp_state: kvm_mp_state::default(),
            debug_regs: kvm_debugregs::default(),
        }
    }
}

impl Vcpu for FakeVcpu {
    fn run(&mut self) -> Result<(), Errno> {
        self.complete();
        loop {
            if self.immediate_exit.0.load(Ordering::SeqCst) != 0 {
                return Err(Errno(libc::EINTR));
            }
            if let Some(result) = self.step() {
                return result;
            }
        }
    }

    fn kvm_run(&mut self) -> &mut [u8] {
        &mut self.kvm_run
    }

    fn immediate_exit(&self) -> Arc<dyn ImmediateExit> {
        self.immediate_exit.clone()
    }

    fn syncs_regs(&self) -> bool {
        false
    }

    fn regs(&self) -> Result<kvm_regs, Errno> {
        Ok(self.state.regs)
    }

    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), Errno> {
        self.state.regs = *regs;
        Ok(())
    }

    fn sregs(&self) -> Result<kvm_sregs, Errno> {
        Ok(self.state.sregs)
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Errno> {
        self.state.sregs = *sregs;
        Ok(())
    }

    fn cpuid(&self) -> Result<CpuId, Errno> {
        Ok(self.state.cpuid.clone())
    }

    fn set_cpuid(&mut self, cpuid: &CpuId) -> Result<(), Errno> {
        self.state.cpuid = cpuid.clone();
        Ok(())
    }

    fn msrs(&self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Errno> {
        let entry = |index: &u32| kvm_msr_entry {
            index: *index,
            data: self.state.msrs.get(index).copied().unwrap_or_default(),
            ..Default::default()
        };
        Ok(indices.iter().map(entry).collect())
    }

    fn set_msrs(&mut self, msrs: &[kvm_msr_entry]) -> Result<(), Errno> {
        let values = msrs.iter().map(|msr| (msr.index, msr.data));
        self.state.msrs.extend(values);
        Ok(())
    }

    fn lapic(&self) -> Result<kvm_lapic_state, Errno> {
        Ok(self.state.lapic)
    }

    fn set_lapic(&mut self, lapic: &kvm_lapic_state) -> Result<(), Errno> {
        self.state.lapic = *lapic;
        Ok(())
    }

    fn xsave(&self) -> Result<Xsave, Errno> {
        Ok(self.state.xsave.clone())
    }

    fn set_xsave(&mut self, xsave: &Xsave) -> Result<(), Errno> {
        self.state.xsave = xsave.clone();
        Ok(())
    }

    fn xcrs(&self) -> Result<kvm_xcrs, Errno> {
        Ok(self.state.xcrs)
    }

    fn set_xcrs(&mut self, xcrs: &kvm_xcrs) -> Result<(), Errno> {
        self.state.xcrs = *xcrs;
        Ok(())
    }

    fn vcpu_events(&self) -> Result<kvm_vcpu_events, Errno> {
        Ok(self.state.events)
    }

    fn set_vcpu_events(&mut self, events: &kvm_vcpu_events) -> Result<(), Errno> {
        self.state.events = *events;
        Ok(())
    }

    fn mp_state(&self) -> Result<kvm_mp_state, Errno> {
        Ok(self.state.mp_state)
    }

    fn set_mp_state(&mut self, state: kvm_mp_state) -> Result<(), Errno> {
        self.state.mp_state = state;
        Ok(())
    }

    fn debug_regs(&self) -> Result<kvm_debugregs, Errno> {
        Ok(self.state.debug_regs)
    }

    fn set_debug_regs(&mut self, debug_regs: &kvm_debugregs) -> Result<(), Errno> {
        self.state.debug_regs = *debug_regs;
        Ok(())
    }

    fn pre_fault(&mut self, gpa: u64, size: u64) -> Result<u64, Errno> {
        self.kernel.count(CallName::PreFault).all_or_nothing()?;
        // The kernel's may overwrite the union, too.
        self.exit(
            KVM_EXIT_MEMORY_FAULT,
            [KVM_MEMORY_EXIT_FLAG_PRIVATE.into(), gpa, PAGE_SIZE],
        );
        Ok(PAGE_SIZE.min(size))
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        Some(linear)
    }
}
