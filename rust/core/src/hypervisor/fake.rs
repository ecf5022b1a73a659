//! A hypervisor without KVM: each vCPU replays a script, and any call can be made to fail.
//!
//! It keeps slots and attributes as KVM does, with KVM's errors for misuse, so that a test can compare what KVM would
//! enforce with what the core believes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use kvm_bindings::{
    KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, kvm_regs, kvm_sregs,
};
use parking_lot::{Mutex, MutexGuard, RwLock};

use super::{ExitFlag, Hypervisor, Limits, Memslot, Vcpu};
use crate::attributes::{PAGE_SIZE, Range, State};
use crate::decode::{PAGE_START, offset, put, u64_at};
use crate::errno::Errno;
use crate::explicit::DOORBELL_PORT;
use crate::memory::Backing;
use crate::run::MEMORY_EXIT_FLAG_PRIVATE;
use crate::sys;

const PAGE_LEN: usize = 2 * 4096;
/// Where IO data lies in the run page.
const IO_DATA: usize = 4096;
const UNION: usize = 32 - PAGE_START;

/// What a vCPU does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// KVM_RUN fails with this errno and writes nothing.
    Fail(i32),
    /// KVM_RUN ends so: errno (0 for success), `exit_reason`, and what else the union holds.
    Exit {
        /// errno, 0 for none.
        errno: i32,
        /// `exit_reason`.
        reason: u32,
        /// The first words of the union.
        words: [u64; 3],
    },
    /// An access to `gpa`, as KVM would treat it with the slots and attributes there are: it faults, becomes MMIO,
    /// or goes through. Executes again after a fault.
    Access {
        /// The address.
        gpa: u64,
        /// A store, not a load.
        write: bool,
    },
    /// A hypercall with RAX, RBX, RCX, RDX.
    Hypercall([u64; 4]),
    /// `out imm8, al` to the doorbell with RAX, RBX, RCX, RDX.
    Doorbell([u64; 4]),
    /// Port IO; `data` is what is written, or as many bytes as are read.
    Io {
        /// The port.
        port: u16,
        /// OUT, not IN.
        write: bool,
        /// Bytes of one access.
        size: u8,
        /// `size * count` bytes.
        data: Vec<u8>,
    },
    /// KVM_RUN does not return until it is kicked.
    Block,
    /// HLT.
    Halt,
    /// A triple fault.
    Shutdown,
    /// KVM_EXIT_INTERNAL_ERROR.
    InternalError(u32),
}

/// A call that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CallName {
    /// KVM_SET_MEMORY_ATTRIBUTES.
    SetAttributes,
    /// KVM_SET_USER_MEMORY_REGION2 with a size.
    CreateMemslot,
    /// The same without.
    DeleteMemslot,
    /// FALLOC_FL_PUNCH_HOLE.
    Discard,
    /// KVM_PRE_FAULT_MEMORY, which maps one page a call.
    PreFault,
}

const CALL_NAMES: usize = CallName::PreFault as usize + 1;

/// A call that is going to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// Which call.
    pub call: CallName,
    /// After this many that go well.
    pub after: u64,
    /// How it fails.
    pub errno: i32,
    /// It does its work on the first half of its range all the same.
    pub half_done: bool,
    /// Every later one fails too, not only this one.
    pub forever: bool,
}

/// What a vCPU found as the answer to the step of this number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Index of the step in the script.
    pub step: usize,
    /// RAX of a request; the data of a read.
    pub value: Vec<u8>,
}

/// What a call did before it failed.
enum Entered {
    Done,
    Failed { errno: Errno, half_done: bool },
}

/// Attributes and counts of a part of all pages, apart from the other parts: vCPUs that work on different pages must not
/// meet here, where they would not meet in the core.
#[derive(Default)]
#[repr(align(128))]
struct Part(Mutex<Counted>);

#[derive(Default)]
struct Counted {
    private: BTreeSet<u64>,
    calls: [u64; CALL_NAMES],
}

const PARTS: usize = 64;
/// Pages that follow each other are in one part up to multiples of this.
const PART_PAGES: u64 = 512;

struct Kernel {
    slots: RwLock<BTreeMap<u32, (Range, bool)>>,
    parts: Vec<Part>,
    injections: Mutex<Vec<Injection>>,
    /// Whether there are any.
    injecting: AtomicBool,
}

struct Script {
    steps: Vec<Step>,
    cycles: u64,
}

/// A virtual machine that replays scripts.
pub struct FakeVm {
    limits: Limits,
    kernel: Arc<Kernel>,
    scripts: Vec<Script>,
    replies: Vec<Arc<Mutex<Vec<Reply>>>>,
}

impl FakeVm {
    /// One script a vCPU; after its end, that `cycles` times, the vCPU halts. vCPUs without a script halt at once.
    pub fn new(limits: Limits, scripts: Vec<Vec<Step>>, cycles: u64) -> Self {
        Self {
            limits,
            kernel: Arc::new(Kernel::new()),
            replies: scripts.iter().map(|_| Arc::default()).collect(),
            scripts: scripts.into_iter().map(|steps| Script { steps, cycles }).collect(),
        }
    }

    /// A host like a plain one: guest_memfd, no attributes, room for `memslots` slots.
    pub fn plain(memslots: u32) -> Limits {
        Limits {
            memslots,
            vcpus: 1024,
            physical_bits: 48,
            private_attribute: false,
            guest_memfd: true,
            guest_memfd_flags: 3,
            pre_fault: true,
        }
    }

    /// A host with private memory.
    pub fn protected(memslots: u32) -> Limits {
        Limits {
            private_attribute: true,
            guest_memfd_flags: 1,
            ..Self::plain(memslots)
        }
    }

    /// Makes calls fail, counted from now on.
    pub fn inject(&self, injection: Injection) {
        let mut injections = self.kernel.injections.lock();
        // From here on whoever calls waits for the lock, so that the count stands still.
        self.kernel.injecting.store(true, Ordering::SeqCst);
        injections.push(Injection {
            after: injection.after + self.kernel.calls(injection.call),
            ..injection
        });
    }

    /// What the vCPU was answered, in order. Not kept for scripts that repeat.
    pub fn replies(&self, vcpu: usize) -> Vec<Reply> {
        self.replies
            .get(vcpu)
            .map(|replies| replies.lock().clone())
            .unwrap_or_default()
    }

    /// Whether the page at `gpa` carries PRIVATE.
    pub fn is_private(&self, gpa: u64) -> bool {
        self.kernel.is_private(gpa)
    }

    /// The slot at `gpa`: whether a guest_memfd is bound to it.
    pub fn slot_at(&self, gpa: u64) -> Option<bool> {
        self.kernel.slot_at(gpa)
    }

    /// How many slots there are.
    pub fn slot_count(&self) -> usize {
        self.kernel.slots.read().len()
    }

    /// How many calls of this name were made.
    pub fn calls(&self, call: CallName) -> u64 {
        self.kernel.calls(call)
    }
}

impl Kernel {
    fn new() -> Self {
        Self {
            slots: RwLock::default(),
            parts: (0..PARTS).map(|_| Part::default()).collect(),
            injections: Mutex::default(),
            injecting: AtomicBool::new(false),
        }
    }

    fn part(&self, page: u64) -> MutexGuard<'_, Counted> {
        // By a hash, so that halves of memory do not meet in the same parts.
        let hash = (page / PART_PAGES).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.parts[(hash >> 32) as usize % PARTS].0.lock()
    }

    fn is_private(&self, gpa: u64) -> bool {
        let page = gpa / PAGE_SIZE;
        self.part(page).private.contains(&page)
    }

    fn slot_at(&self, gpa: u64) -> Option<bool> {
        let slots = self.slots.read();
        let mut slots = slots.values();
        slots
            .find(|(range, _)| range.contains(gpa))
            .map(|(_, guest_memfd)| *guest_memfd)
    }

    fn calls(&self, call: CallName) -> u64 {
        let parts = self.parts.iter().map(|part| part.0.lock().calls[call as usize]);
        parts.sum()
    }

    /// Counts a call that is about this address: whether it is to fail.
    fn enter(&self, call: CallName, gpa: u64) -> Entered {
        let count = || self.part(gpa / PAGE_SIZE).calls[call as usize] += 1;
        if !self.injecting.load(Ordering::SeqCst) {
            count();
            return Entered::Done;
        }
        let injections = self.injections.lock();
        let number = self.calls(call);
        count();
        let hit = |injection: &&Injection| {
            let now = injection.after == number || injection.forever && injection.after < number;
            injection.call == call && now
        };
        match injections.iter().find(hit) {
            Some(injection) => Entered::Failed {
                errno: Errno(injection.errno),
                half_done: injection.half_done,
            },
            None => Entered::Done,
        }
    }

    fn paint(&self, range: Range, to: State) {
        let (mut page, end) = (range.gpa() / PAGE_SIZE, range.end() / PAGE_SIZE);
        while page < end {
            let stop = end.min((page / PART_PAGES + 1) * PART_PAGES);
            let private = &mut self.part(page).private;
            for page in page..stop {
                match to {
                    State::Private => private.insert(page),
                    State::Shared => private.remove(&page),
                };
            }
            page = stop;
        }
    }
}

impl Entered {
    /// For calls that do all or nothing.
    fn whole(self) -> Result<(), Errno> {
        match self {
            Entered::Done => Ok(()),
            Entered::Failed { errno, .. } => Err(errno),
        }
    }
}

impl Hypervisor for FakeVm {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<OwnedFd, Errno> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) || flags & !self.limits.guest_memfd_flags != 0 {
            return Err(Errno(libc::EINVAL));
        }
        let file = File::from(sys::memfd_create(c"fake-guest-memfd")?);
        file.set_len(size)?;
        Ok(file.into())
    }

    fn create_memslot(&self, slot: &Memslot<'_>) -> Result<(), Errno> {
        self.kernel.enter(CallName::CreateMemslot, 0).whole()?;
        let mut slots = self.kernel.slots.write();
        if slot.id >= self.limits.memslots || slots.contains_key(&slot.id) {
            return Err(Errno(libc::EINVAL));
        }
        if slots.values().any(|(range, _)| range.overlaps(&slot.range)) {
            return Err(Errno(libc::EEXIST));
        }
        slots.insert(slot.id, (slot.range, slot.guest_memfd.is_some()));
        Ok(())
    }

    fn delete_memslot(&self, id: u32) -> Result<(), Errno> {
        self.kernel.enter(CallName::DeleteMemslot, 0).whole()?;
        let removed = self.kernel.slots.write().remove(&id);
        removed.map(drop).ok_or(Errno(libc::EINVAL))
    }

    fn set_attributes(&self, range: Range, to: State) -> Result<(), Errno> {
        let entered = self.kernel.enter(CallName::SetAttributes, range.gpa());
        if !self.limits.private_attribute {
            return Err(Errno(libc::EINVAL));
        }
        match entered {
            Entered::Done => self.kernel.paint(range, to),
            Entered::Failed { errno, half_done } => {
                let half = range.pages() / 2 * PAGE_SIZE;
                if let Some(half) = Range::new(range.gpa(), half).filter(|_| half_done) {
                    self.kernel.paint(half, to);
                }
                return Err(errno);
            }
        }
        Ok(())
    }

    // Its guests have no memory of their own: what this process did not touch is a hole.

    fn discard(&self, side: &Backing, range: Range) -> Result<(), Errno> {
        self.kernel.enter(CallName::Discard, range.gpa()).whole()?;
        match side.touched(range) {
            true => sys::punch_hole(side.file(), range.gpa(), range.size()),
            false => Ok(()),
        }
    }

    fn has_data(&self, side: &Backing, range: Range) -> Result<bool, Errno> {
        Ok(side.touched(range) && side.has_data(range)?)
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, Errno> {
        let script = self.scripts.get(index as usize);
        Ok(Box::new(FakeVcpu {
            kernel: self.kernel.clone(),
            steps: script.map(|script| script.steps.clone()).unwrap_or_default(),
            cycles: script.map_or(0, |script| script.cycles),
            next: 0,
            awaiting: None,
            replies: self.replies.get(index as usize).cloned().unwrap_or_default(),
            page: [0; PAGE_LEN - PAGE_START],
            flag: Arc::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
        }))
    }
}

/// Apart from other vCPUs' flags.
#[derive(Default)]
#[repr(align(128))]
struct FakeFlag(AtomicU8);

impl ExitFlag for FakeFlag {
    fn byte(&self) -> &AtomicU8 {
        &self.0
    }
}

/// Where the answer to a step will be.
#[derive(Clone, Copy)]
enum Answer {
    HypercallRet,
    Rax,
    Mmio,
    Io(usize),
    /// A write: nothing to find.
    Nothing,
}

/// Apart from other vCPUs in memory too.
#[repr(align(128))]
struct FakeVcpu {
    kernel: Arc<Kernel>,
    steps: Vec<Step>,
    cycles: u64,
    next: usize,
    awaiting: Option<Answer>,
    replies: Arc<Mutex<Vec<Reply>>>,
    page: [u8; PAGE_LEN - PAGE_START],
    flag: Arc<FakeFlag>,
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl FakeVcpu {
    fn advance(&mut self) {
        self.next += 1;
        if self.next >= self.steps.len() && self.cycles > 1 {
            self.cycles -= 1;
            self.next = 0;
        }
        // A guest's instruction pointer moves too.
        self.regs.rip += 1;
    }

    /// Takes the answer to the last exit, as KVM does first of all in KVM_RUN.
    fn complete(&mut self) {
        let Some(answer) = self.awaiting.take() else {
            return;
        };
        let word = |at| u64_at(&self.page, at).unwrap_or_default().to_le_bytes().to_vec();
        let value = match answer {
            Answer::HypercallRet => word(offset::HYPERCALL_RET),
            Answer::Rax => self.regs.rax.to_le_bytes().to_vec(),
            Answer::Mmio => word(offset::MMIO_DATA),
            Answer::Io(len) => {
                let start = IO_DATA - PAGE_START;
                self.page.get(start..start + len).unwrap_or_default().to_vec()
            }
            Answer::Nothing => Vec::new(),
        };
        if self.cycles <= 1 {
            self.replies.lock().push(Reply { step: self.next, value });
        }
        self.advance();
    }

    fn exit(&mut self, reason: u32, words: [u64; 3]) {
        put(&mut self.page, offset::EXIT_REASON, &reason.to_le_bytes());
        for (i, word) in words.iter().enumerate() {
            put(&mut self.page, UNION + i * 8, &word.to_le_bytes());
        }
    }

    fn await_reply(&mut self, answer: Answer, reason: u32, words: [u64; 3]) -> Option<Result<(), Errno>> {
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
                put(&mut self.page, UNION + 24, &attributes.to_le_bytes());
                // Stale, as an old kernel leaves it: whoever answers has to write it.
                put(&mut self.page, offset::HYPERCALL_RET, &u64::MAX.to_le_bytes());
                self.await_reply(Answer::HypercallRet, KVM_EXIT_HYPERCALL, [nr, gpa, pages])
            }
            Step::Doorbell([rax, rbx, rcx, rdx]) => {
                self.regs = kvm_regs {
                    rax,
                    rbx,
                    rcx,
                    rdx,
                    ..self.regs
                };
                let io = io_words(DOORBELL_PORT, true, 1, 1);
                self.await_reply(Answer::Rax, KVM_EXIT_IO, io)
            }
            Step::Io {
                port,
                write,
                size,
                data,
            } => {
                put(&mut self.page, IO_DATA - PAGE_START, &data);
                let count = data.len() / usize::from(size.max(1));
                let answer = if write { Answer::Nothing } else { Answer::Io(data.len()) };
                self.await_reply(answer, KVM_EXIT_IO, io_words(port, write, size, count as u32))
            }
            Step::Block => {
                while self.flag.0.load(Ordering::SeqCst) == 0 {
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
                self.exit(KVM_EXIT_MEMORY_FAULT, [MEMORY_EXIT_FLAG_PRIVATE, page, PAGE_SIZE]);
                Some(Err(Errno(libc::EFAULT)))
            }
            (false, None) => {
                let answer = if write { Answer::Nothing } else { Answer::Mmio };
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

impl Vcpu for FakeVcpu {
    fn run(&mut self) -> Result<(), Errno> {
        self.complete();
        loop {
            if self.flag.0.load(Ordering::SeqCst) != 0 {
                return Err(Errno(libc::EINTR));
            }
            if let Some(result) = self.step() {
                return result;
            }
        }
    }

    fn page(&mut self) -> &mut [u8] {
        &mut self.page
    }

    fn exit_flag(&self) -> Arc<dyn ExitFlag> {
        self.flag.clone()
    }

    fn syncs_regs(&self) -> bool {
        false
    }

    fn regs(&self) -> Result<kvm_regs, Errno> {
        Ok(self.regs)
    }

    fn set_regs(&mut self, regs: &kvm_regs) -> Result<(), Errno> {
        self.regs = *regs;
        Ok(())
    }

    fn sregs(&self) -> Result<kvm_sregs, Errno> {
        Ok(self.sregs)
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) -> Result<(), Errno> {
        self.sregs = *sregs;
        Ok(())
    }

    fn pre_fault(&mut self, range: Range) -> Result<u64, Errno> {
        self.kernel.enter(CallName::PreFault, range.gpa()).whole()?;
        // As the kernel does in passing.
        self.exit(
            KVM_EXIT_MEMORY_FAULT,
            [MEMORY_EXIT_FLAG_PRIVATE, range.gpa(), PAGE_SIZE],
        );
        Ok(PAGE_SIZE.min(range.size()))
    }

    fn translate(&self, linear: u64) -> Option<u64> {
        Some(linear)
    }
}
