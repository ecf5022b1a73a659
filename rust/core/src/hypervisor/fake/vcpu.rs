//! The vCPU of the fake: each KVM_RUN executes its script up to the next exit.
//!
//! One file: the steps of a script, and the getters and setters of a vCPU, which are a line or two each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_MEMORY_EXIT_FLAG_PRIVATE, Xsave,
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use parking_lot::Mutex;

use super::kernel::{CallName, Kernel};
use super::registers::Registers;
use super::script::{Reply, Step};
use crate::errno::Errno;
use crate::hypervisor::exit::{START, offset, put, u64_at};
use crate::hypervisor::hypercall::DOORBELL_PORT;
use crate::hypervisor::vm::{ImmediateExit, Inspect, Vcpu};

const PAGE_SIZE: u64 = 4096;
/// The size of kvm_run in bytes: two pages, the second for the data of port IO.
const KVM_RUN_LEN: usize = 2 * 4096;
const IO_DATA: usize = 4096;
/// What stores write.
const MMIO_DATA: u64 = 0x1122_3344_5566_7788;

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
    Mmio(usize),
    Io(usize),
    ReadMsr,
    WriteMsr,
    /// A store or OUT, which gets no answer.
    Nothing,
    /// The load and the store of an instruction that does both.
    Modify {
        gpa: u64,
        loaded: bool,
    },
}

pub(super) struct FakeVcpu {
    kernel: Arc<Kernel>,
    steps: Vec<Step>,
    /// How often the script is still to be executed, with the present time.
    cycles: u64,
    /// The step to execute next.
    next: usize,
    awaiting: Option<ReplyTo>,
    /// An emulated read-modify-write that is just over: its step, and RIP before it.
    modified: Option<(usize, u64)>,
    replies: Arc<Mutex<Vec<Reply>>>,
    /// What [`Step::Listen`] is to execute.
    handed: Receiver<Step>,
    /// The present step was handed over.
    at_handed: bool,
    kvm_run: [u8; KVM_RUN_LEN - START],
    immediate_exit: Arc<FakeImmediateExit>,
    state: Arc<Mutex<Registers>>,
}

impl FakeVcpu {
    pub(super) fn new(
        kernel: Arc<Kernel>,
        steps: Vec<Step>,
        cycles: u64,
        replies: Arc<Mutex<Vec<Reply>>>,
        handed: Receiver<Step>,
    ) -> Self {
        Self {
            kernel,
            steps,
            cycles,
            next: 0,
            awaiting: None,
            modified: None,
            replies,
            handed,
            at_handed: false,
            kvm_run: [0; KVM_RUN_LEN - START],
            immediate_exit: Arc::default(),
            state: Arc::default(),
        }
    }

    fn other(&self) -> Result<(), Errno> {
        self.kernel.count(CallName::Other).all_or_nothing()
    }

    fn advance(&mut self) {
        match std::mem::take(&mut self.at_handed) {
            true => drop(self.steps.remove(self.next)),
            false => self.next += 1,
        }
        if self.next >= self.steps.len() && self.cycles > 1 {
            self.cycles -= 1;
            self.next = 0;
        }
        // A guest's instruction pointer moves too.
        self.state.lock().regs.rip += 1;
    }

    /// Takes the answer to the last exit, which KVM_RUN does before anything else. Returns whether that made another exit.
    fn complete(&mut self) -> bool {
        let Some(answer) = self.awaiting.take() else {
            return false;
        };
        let word = |at| u64_at(&self.kvm_run, at).unwrap_or_default().to_le_bytes().to_vec();
        let value = match answer {
            ReplyTo::HypercallRet => word(offset::HYPERCALL_RET),
            ReplyTo::Rax => self.state.lock().regs.rax.to_le_bytes().to_vec(),
            ReplyTo::Mmio(len) => word(offset::MMIO_DATA)[..len].to_vec(),
            ReplyTo::Io(len) => {
                let start = IO_DATA - START;
                self.kvm_run.get(start..start + len).unwrap_or_default().to_vec()
            }
            ReplyTo::ReadMsr => [&self.msr_error()[..], &word(offset::MSR_DATA)].concat(),
            ReplyTo::WriteMsr => self.msr_error().to_vec(),
            ReplyTo::Nothing => Vec::new(),
            ReplyTo::Modify { gpa, loaded: false } => {
                self.modify(gpa, true);
                return true;
            }
            ReplyTo::Modify { loaded: true, .. } => {
                self.modified = Some((self.next, self.state.lock().regs.rip - 1));
                self.next += 1;
                return false;
            }
        };
        self.answered(value);
        false
    }

    /// The step is over.
    fn answered(&mut self, value: Vec<u8>) {
        if self.cycles <= 1 {
            self.replies.lock().push(Reply { step: self.next, value });
        }
        self.advance();
    }

    /// The exit for the load, or the store, of a read-modify-write.
    fn modify(&mut self, gpa: u64, loaded: bool) {
        self.awaiting = Some(ReplyTo::Modify { gpa, loaded });
        self.exit(KVM_EXIT_MMIO, [gpa, MMIO_DATA, 8 | u64::from(loaded) << 32]);
        self.state.lock().regs.rip += u64::from(loaded);
    }

    fn msr_error(&self) -> [u8; 1] {
        [self.kvm_run.get(offset::MSR_ERROR).copied().unwrap_or_default()]
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
            Step::Modify { gpa, native: true } if self.kernel.slot_at(gpa).is_some() => {
                self.advance();
                None
            }
            Step::Modify { gpa, .. } => {
                self.modify(gpa, false);
                Some(Ok(()))
            }
            Step::Hypercall([nr, gpa, pages, attributes]) => {
                put(&mut self.kvm_run, offset::UNION + 24, &attributes.to_le_bytes());
                // Old kernels leave an old value here, so the core has to write its answer even if that is 0.
                put(&mut self.kvm_run, offset::HYPERCALL_RET, &u64::MAX.to_le_bytes());
                self.await_reply(ReplyTo::HypercallRet, KVM_EXIT_HYPERCALL, [nr, gpa, pages])
            }
            Step::Doorbell([rax, rbx, rcx, rdx]) => {
                let mut state = self.state.lock();
                state.regs = kvm_regs {
                    rax,
                    rbx,
                    rcx,
                    rdx,
                    ..state.regs
                };
                drop(state);
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
            Step::Mmio { gpa, write: true, .. } if self.kernel.ring_doorbell(gpa) => {
                self.answered(Vec::new());
                None
            }
            Step::Mmio { gpa, write, data } => {
                let mut bytes = [0; 8];
                let len = data.len().min(bytes.len());
                bytes[..len].copy_from_slice(&data[..len]);
                self.mmio(gpa, write, u64::from_le_bytes(bytes), len)
            }
            // The words are the error, which user space has to write, the reason and index, and the data.
            Step::ReadMsr(index) => {
                self.await_reply(ReplyTo::ReadMsr, KVM_EXIT_X86_RDMSR, [0, u64::from(index) << 32, 0])
            }
            Step::WriteMsr { index, data } => {
                self.await_reply(ReplyTo::WriteMsr, KVM_EXIT_X86_WRMSR, [0, u64::from(index) << 32, data])
            }
            Step::Block => {
                while self.immediate_exit.0.load(Ordering::SeqCst) == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                self.advance();
                Some(Err(Errno(libc::EINTR)))
            }
            Step::Listen => {
                // A step that it is handed is a step of the script until it is over.
                if let Ok(step) = self.handed.recv_timeout(Duration::from_millis(1)) {
                    self.steps.insert(self.next, step);
                    self.at_handed = true;
                }
                None
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
            (false, None) => self.mmio(gpa, write, MMIO_DATA, 8),
        }
    }

    fn mmio(&mut self, gpa: u64, write: bool, data: u64, len: usize) -> Option<Result<(), Errno>> {
        let answer = if write { ReplyTo::Nothing } else { ReplyTo::Mmio(len) };
        let len_and_write = len as u64 | u64::from(write) << 32;
        self.await_reply(answer, KVM_EXIT_MMIO, [gpa, data, len_and_write])
    }
}

fn io_words(port: u16, write: bool, size: u8, count: u32) -> [u64; 3] {
    let head = u64::from(write) | u64::from(size) << 8 | u64::from(port) << 16 | u64::from(count) << 32;
    [head, IO_DATA as u64, 0]
}

impl Vcpu for FakeVcpu {
    fn run(&mut self) -> Result<(), Errno> {
        if self.complete() {
            return Ok(());
        }
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

    fn inspect(&self) -> Arc<dyn Inspect> {
        self.state.clone()
    }

    fn syncs_regs(&self) -> bool {
        false
    }

    fn regs(&self) -> Result<kvm_regs, Errno> {
        self.other()?;
        Ok(self.state.lock().regs)
    }

    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), Errno> {
        self.other()?;
        if let Some((step, rip)) = self.modified.take()
            && rip == regs.rip
        {
            self.next = step;
        }
        self.state.lock().regs = *regs;
        Ok(())
    }

    fn sregs(&self) -> Result<kvm_sregs, Errno> {
        self.other()?;
        Ok(self.state.lock().sregs)
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Errno> {
        self.other()?;
        self.state.lock().sregs = *sregs;
        Ok(())
    }

    fn cpuid(&self) -> Result<CpuId, Errno> {
        self.other()?;
        Ok(self.state.lock().cpuid.clone())
    }

    fn set_cpuid(&mut self, cpuid: &CpuId) -> Result<(), Errno> {
        self.other()?;
        self.state.lock().cpuid = cpuid.clone();
        Ok(())
    }

    fn msrs(&self, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Errno> {
        self.other()?;
        let state = self.state.lock();
        let entry = |index: &u32| kvm_msr_entry {
            index: *index,
            data: state.msrs.get(index).copied().unwrap_or_default(),
            ..Default::default()
        };
        Ok(indices.iter().map(entry).collect())
    }

    fn set_msrs(&mut self, msrs: &[kvm_msr_entry]) -> Result<(), Errno> {
        self.other()?;
        let values = msrs.iter().map(|msr| (msr.index, msr.data));
        self.state.lock().msrs.extend(values);
        Ok(())
    }

    fn lapic(&self) -> Result<kvm_lapic_state, Errno> {
        self.other()?;
        Ok(self.state.lock().lapic)
    }

    fn set_lapic(&mut self, lapic: &kvm_lapic_state) -> Result<(), Errno> {
        self.other()?;
        self.state.lock().lapic = *lapic;
        Ok(())
    }

    fn xsave(&self) -> Result<Xsave, Errno> {
        self.other()?;
        Ok(self.state.lock().xsave.clone())
    }

    fn set_xsave(&mut self, xsave: &Xsave) -> Result<(), Errno> {
        self.other()?;
        self.state.lock().xsave = xsave.clone();
        Ok(())
    }

    fn xcrs(&self) -> Result<kvm_xcrs, Errno> {
        self.other()?;
        Ok(self.state.lock().xcrs)
    }

    fn set_xcrs(&mut self, xcrs: &kvm_xcrs) -> Result<(), Errno> {
        self.other()?;
        self.state.lock().xcrs = *xcrs;
        Ok(())
    }

    fn vcpu_events(&self) -> Result<kvm_vcpu_events, Errno> {
        self.other()?;
        Ok(self.state.lock().events)
    }

    fn set_vcpu_events(&mut self, events: &kvm_vcpu_events) -> Result<(), Errno> {
        self.other()?;
        self.state.lock().events = *events;
        Ok(())
    }

    fn mp_state(&self) -> Result<kvm_mp_state, Errno> {
        self.other()?;
        Ok(self.state.lock().mp_state)
    }

    fn set_mp_state(&mut self, state: kvm_mp_state) -> Result<(), Errno> {
        self.other()?;
        self.state.lock().mp_state = state;
        Ok(())
    }

    fn debug_regs(&self) -> Result<kvm_debugregs, Errno> {
        self.other()?;
        Ok(self.state.lock().debug_regs)
    }

    fn set_debug_regs(&mut self, debug_regs: &kvm_debugregs) -> Result<(), Errno> {
        self.other()?;
        self.state.lock().debug_regs = *debug_regs;
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
