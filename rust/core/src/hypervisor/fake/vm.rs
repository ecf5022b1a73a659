//! The virtual machine of the fake.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use kvm_bindings::{CpuId, kvm_clock_data, kvm_cpuid_entry2};
use parking_lot::Mutex;
use rustix::fs::MemfdFlags;
use vmm_sys_util::eventfd::EventFd;

use super::kernel::{CallName, Fate, Injection, Kernel, Slot};
use super::script::{Reply, Step};
use super::vcpu::FakeVcpu;
use crate::errno::Errno;
use crate::hypervisor::interrupts::Message;
use crate::hypervisor::raw;
use crate::hypervisor::vm::{Capabilities, Controllers, FilePart, Hypervisor, Memslot, Vcpu};

/// Bits of a guest-physical address.
const PHYSICAL_BITS: u32 = 48;

/// The MSRs of a vCPU: the TSC, EFER, and where SYSCALL enters the kernel.
const MSRS: [u32; 3] = [0x10, 0xc000_0080, 0xc000_0082];

/// How long [`FakeVm::execute`] waits for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

struct Script {
    steps: Vec<Step>,
    cycles: u64,
}

/// Hands steps to a vCPU that is at [`Step::Listen`].
struct Hand {
    to: Sender<Step>,
    /// Until the vCPU is created.
    taken: Mutex<Option<Receiver<Step>>>,
}

/// A virtual machine that replays scripts.
pub struct FakeVm {
    capabilities: Capabilities,
    kernel: Arc<Kernel>,
    scripts: Vec<Script>,
    replies: Vec<Arc<Mutex<Vec<Reply>>>>,
    hands: Vec<Hand>,
}

impl FakeVm {
    /// A script for each vCPU, which executes it `cycles` times and then halts. A vCPU without a script halts at once.
    pub fn new(capabilities: Capabilities, scripts: Vec<Vec<Step>>, cycles: u64) -> Self {
        let hand = |_: &Vec<Step>| {
            let (to, taken) = mpsc::channel();
            let taken = Mutex::new(Some(taken));
            Hand { to, taken }
        };
        Self {
            capabilities,
            kernel: Arc::default(),
            hands: scripts.iter().map(hand).collect(),
            replies: scripts.iter().map(|_| Arc::default()).collect(),
            scripts: scripts.into_iter().map(|steps| Script { steps, cycles }).collect(),
        }
    }

    /// What an ordinary VM has on Linux 6.18: a guest_memfd that can be mapped, no attributes, and `memslots` memslots.
    pub fn plain(memslots: u32) -> Capabilities {
        Capabilities {
            memslots,
            vcpus: 1024,
            private_attribute: false,
            guest_memfd: true,
            guest_memfd_flags: 3,
            pre_fault: true,
        }
    }

    /// What a VM with private memory has: attributes, and a guest_memfd.
    pub fn protected(memslots: u32) -> Capabilities {
        Capabilities {
            private_attribute: true,
            guest_memfd_flags: 1,
            ..Self::plain(memslots)
        }
    }

    /// Makes system calls fail; they are counted from now on.
    pub fn inject(&self, injection: Injection) {
        self.kernel.inject(injection);
    }

    /// The answers that the vCPU got, in order. Of a script that repeats, those of its last cycle.
    pub fn replies(&self, vcpu: usize) -> Vec<Reply> {
        self.replies
            .get(vcpu)
            .map(|replies| replies.lock().clone())
            .unwrap_or_default()
    }

    /// Has a vCPU execute a step when it is at [`Step::Listen`].
    pub fn hand(&self, vcpu: usize, step: Step) {
        if let Some(hand) = self.hands.get(vcpu) {
            // It fails if the vCPU is gone.
            let _ = hand.to.send(step);
        }
    }

    /// The same for a step that gets an answer, and waits for it. [`replies`](Self::replies) does not have it then. `None`
    /// if there is none for twenty seconds, because no run is in progress or it ended first.
    pub fn execute(&self, vcpu: usize, step: Step) -> Option<Vec<u8>> {
        let replies = self.replies.get(vcpu)?;
        let before = replies.lock().len();
        self.hand(vcpu, step);
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            if let Some(reply) = replies.lock().drain(before..).next() {
                return Some(reply.value);
            }
            std::thread::yield_now();
        }
        None
    }

    /// How often an interrupt was raised since this was last asked.
    pub fn raised(&self, gsi: u32) -> u64 {
        self.kernel.raised(gsi)
    }

    /// What each interrupt is that is no pin of an interrupt controller.
    pub fn messages(&self) -> Vec<Option<Message>> {
        self.kernel.messages()
    }

    /// The addresses at which a store rings a doorbell, without an exit.
    pub fn doorbells(&self) -> Vec<u64> {
        self.kernel.doorbells()
    }

    /// Whether the page at `gpa` carries PRIVATE.
    pub fn is_private(&self, gpa: u64) -> bool {
        self.kernel.is_private(gpa)
    }

    /// Whether the memslot at `gpa` has a guest_memfd; `None` where there is no memslot.
    pub fn slot_at(&self, gpa: u64) -> Option<bool> {
        self.kernel.slot_at(gpa)
    }

    /// How many memslots there are.
    pub fn slot_count(&self) -> usize {
        self.kernel.slot_count()
    }

    fn other(&self) -> Result<(), Errno> {
        self.kernel.count(CallName::Other).all_or_nothing()
    }

    /// How many of these calls were made.
    pub fn calls(&self, call: CallName) -> u64 {
        self.kernel.calls(call)
    }
}

impl Hypervisor for FakeVm {
    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    fn create_interrupt_controllers(&self) -> Result<(), Errno> {
        self.other()
    }

    fn controllers(&self) -> Result<Controllers, Errno> {
        self.other()?;
        Ok(self.kernel.controllers())
    }

    fn set_controllers(&self, controllers: &Controllers) -> Result<(), Errno> {
        self.other()?;
        self.kernel.set_controllers(controllers.clone());
        Ok(())
    }

    fn clock(&self) -> Result<kvm_clock_data, Errno> {
        self.other()?;
        Ok(self.kernel.clock())
    }

    fn set_clock(&self, clock: &kvm_clock_data) -> Result<(), Errno> {
        self.other()?;
        self.kernel.set_clock(*clock);
        Ok(())
    }

    fn msr_indices(&self) -> Result<Vec<u32>, Errno> {
        self.other()?;
        Ok(MSRS.to_vec())
    }

    fn route_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), Errno> {
        self.other()?;
        self.kernel.route_interrupt(gsi, event.try_clone()?);
        Ok(())
    }

    fn route_messages(&self, messages: &[Option<Message>]) -> Result<(), Errno> {
        self.other()?;
        self.kernel.route_messages(messages);
        Ok(())
    }

    fn set_doorbell(&self, event: &EventFd, gpa: u64, on: bool) -> Result<(), Errno> {
        self.other()?;
        let event = if on { Some(event.try_clone()?) } else { None };
        self.kernel.set_doorbell(gpa, event)
    }

    fn take_msr(&self, _index: u32) -> Result<(), Errno> {
        self.other()
    }

    /// One leaf: the width of guest-physical addresses.
    fn supported_cpuid(&self) -> Result<CpuId, Errno> {
        self.other()?;
        let sizes = kvm_cpuid_entry2 {
            function: 0x8000_0008,
            eax: PHYSICAL_BITS,
            ..Default::default()
        };
        CpuId::from_entries(&[sizes]).map_err(|_| Errno(libc::ENOMEM))
    }

    fn create_guest_memfd(&self, size: u64, flags: u64) -> Result<OwnedFd, Errno> {
        self.other()?;
        if size == 0 || !size.is_multiple_of(4096) || flags & !self.capabilities.guest_memfd_flags != 0 {
            return Err(Errno(libc::EINVAL));
        }
        let file = File::from(rustix::fs::memfd_create("fake-guest-memfd", MemfdFlags::CLOEXEC)?);
        file.set_len(size)?;
        Ok(file.into())
    }

    fn create_memslot(&self, slot: &Memslot<'_>) -> Result<(), Errno> {
        self.kernel.count(CallName::CreateMemslot).all_or_nothing()?;
        if slot.id >= self.capabilities.memslots {
            return Err(Errno(libc::EINVAL));
        }
        let guest_memfd = slot.guest_memfd.is_some();
        let addresses = slot.gpa..slot.gpa + slot.size;
        self.kernel.create_slot(slot.id, Slot { addresses, guest_memfd })
    }

    fn delete_memslot(&self, id: u32) -> Result<(), Errno> {
        self.kernel.count(CallName::DeleteMemslot).all_or_nothing()?;
        self.kernel.delete_slot(id)
    }

    fn set_memory_attributes(&self, gpa: u64, size: u64, private: bool) -> Result<(), Errno> {
        let fate = self.kernel.count(CallName::SetAttributes);
        if !self.capabilities.private_attribute {
            return Err(Errno(libc::EINVAL));
        }
        match fate {
            Fate::Succeed => {
                self.kernel.set_private(gpa, size, private);
                Ok(())
            }
            Fate::Fail { errno, half_done } => {
                if half_done {
                    self.kernel.set_private(gpa, size / 4096 / 2 * 4096, private);
                }
                Err(errno)
            }
        }
    }

    fn punch_hole(&self, part: &FilePart<'_>) -> Result<(), Errno> {
        self.kernel.count(CallName::Discard).all_or_nothing()?;
        match part.touched.overlaps(part.offset, part.len) {
            true => raw::punch_hole(part.file, part.offset, part.len),
            false => Ok(()),
        }
    }

    fn has_data(&self, part: &FilePart<'_>) -> Result<bool, Errno> {
        self.other()?;
        let touched = part.touched.overlaps(part.offset, part.len);
        Ok(touched && raw::has_data(part.file, part.offset, part.len)?)
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, Errno> {
        self.other()?;
        let (steps, cycles) = match self.scripts.get(index as usize) {
            Some(script) => (script.steps.clone(), script.cycles),
            None => (Vec::new(), 0),
        };
        let replies = self.replies.get(index as usize).cloned().unwrap_or_default();
        // One that nobody can hand anything has no script.
        let handed = self.hands.get(index as usize).and_then(|hand| hand.taken.lock().take());
        let handed = handed.unwrap_or_else(|| mpsc::channel().1);
        Ok(Box::new(FakeVcpu::new(
            self.kernel.clone(),
            steps,
            cycles,
            replies,
            handed,
        )))
    }
}
