//! Who asks: the vCPU whose request is being judged, for hooks that want to know more of it than the request says.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::boot::running_kernel::RunningKernel;
use crate::errno::Errno;
use crate::error::Failure;
use crate::hypervisor::vm::Inspect;
use crate::input::Watch;
use crate::memory::address::{PAGE_SIZE, State};
use crate::memory::backing::Backing;
use crate::memory::guest_memory::{GuestMemory, Seal};
use crate::memory::listeners;
use crate::x86::instruction::{LONGEST, disassemble};

/// A vCPU that is outside of KVM_RUN, and what it runs.
#[derive(Clone)]
pub struct Asker {
    vcpu: Arc<dyn Inspect>,
    memory: Arc<GuestMemory>,
    /// The kernel, if Linux was booted.
    kernel: Option<Arc<RunningKernel>>,
    /// Whether its run is ending.
    ending: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// No symbols are read any more while a run ends.
#[derive(Debug, thiserror::Error)]
#[error("the run is ending: the kernel's symbols are not read any more")]
struct Ending;

/// Where a vCPU was when it ended the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whereabouts {
    /// The vCPU's index.
    pub vcpu: u32,
    /// Its instruction pointer.
    pub rip: u64,
    /// CR2: the linear address of its last page fault.
    pub cr2: u64,
    /// The function and the offset in it, if the kernel's symbols are known.
    pub symbol: Option<String>,
    /// The instruction, if its bytes can be had.
    pub instruction: Option<String>,
}

impl Asker {
    pub(crate) fn new(
        vcpu: Arc<dyn Inspect>,
        memory: Arc<GuestMemory>,
        kernel: Option<Arc<RunningKernel>>,
        ending: Arc<dyn Fn() -> bool + Send + Sync>,
    ) -> Self {
        Self {
            vcpu,
            memory,
            kernel,
            ending,
        }
    }

    /// Fails when the run is ending, or `watch` fails.
    fn goes_on(&self, watch: &mut Watch<'_>) -> Result<(), Failure> {
        match (self.ending)() {
            true => Err(Ending.into()),
            false => watch(),
        }
    }

    /// The general registers (KVM_GET_REGS).
    ///
    /// # Errors
    /// The kernel's.
    pub fn regs(&self) -> Result<kvm_regs, Errno> {
        self.vcpu.regs()
    }

    /// The function that it is in, and the offset, as "name+0x1f"; `None` where no kernel was booted or its symbols are
    /// not known.
    ///
    /// # Errors
    /// The run is ending, or a failure of `watch`, while the symbols are read.
    pub fn symbol(&self, watch: &mut Watch<'_>) -> Result<Option<String>, Failure> {
        let (Some(kernel), Ok(regs)) = (&self.kernel, self.vcpu.regs()) else {
            return Ok(None);
        };
        kernel.symbol(regs.rip, self.vcpu.as_ref(), &mut || self.goes_on(watch))
    }

    /// The instruction that it is at. Its bytes are those of the kernel's image, which the kernel patches at boot, or else
    /// of shared memory; `None` where it is in private memory.
    ///
    /// # Errors
    /// As [`Asker::symbol`].
    pub fn instruction(&self, watch: &mut Watch<'_>) -> Result<Option<String>, Failure> {
        let (Ok(regs), Ok(sregs)) = (self.vcpu.regs(), self.vcpu.sregs()) else {
            return Ok(None);
        };
        let bits = match (sregs.cs.l, sregs.cs.db) {
            (0, 0) => 16,
            (0, _) => 32,
            _ => 64,
        };
        let mut goes_on = || self.goes_on(watch);
        let image = match &self.kernel {
            Some(kernel) => kernel.code(regs.rip, LONGEST, self.vcpu.as_ref(), &mut goes_on)?,
            None => None,
        };
        let bytes = match image {
            Some(bytes) => bytes.to_vec(),
            None => self.shared_code(linear(&regs, &sregs)),
        };
        Ok(disassemble(&bytes, bits, regs.rip))
    }

    /// Bytes from a linear address on, as far as they are in shared memory.
    fn shared_code(&self, linear: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < LONGEST {
            let at = linear.wrapping_add(bytes.len() as u64);
            let left = (LONGEST - bytes.len()) as u64;
            let mut part = vec![0; left.min(PAGE_SIZE - at % PAGE_SIZE) as usize];
            if self.read_shared(at, &mut part).is_none() {
                break;
            }
            bytes.extend(part);
        }
        bytes
    }

    fn read_shared(&self, linear: u64, into: &mut [u8]) -> Option<()> {
        let place = self.memory.views().locate(self.vcpu.translate(linear)?)?;
        // A listener is called with pages held, perhaps these.
        if place.view == Some(State::Private) || listeners::inside() {
            return None;
        }
        let len = into.len() as u64;
        let mut copy = |side: &Backing, gpa, part: Range<usize>| side.read(gpa, &mut into[part]);
        self.memory.on_bytes(place.gpa, len, Seal::Whole, &mut copy).ok()
    }

    /// Where it is, without names once the run is ending.
    pub(crate) fn whereabouts(&self, vcpu: u32) -> Option<Whereabouts> {
        let go_on = &mut || Ok(());
        Some(Whereabouts {
            vcpu,
            rip: self.vcpu.regs().ok()?.rip,
            cr2: self.vcpu.sregs().ok()?.cr2,
            symbol: self.symbol(go_on).unwrap_or_default(),
            instruction: self.instruction(go_on).unwrap_or_default(),
        })
    }
}

/// The linear address of the instruction: outside of 64-bit mode RIP counts from the code segment's base.
pub(crate) fn linear(regs: &kvm_regs, sregs: &kvm_sregs) -> u64 {
    match sregs.cs.l {
        0 => sregs.cs.base.wrapping_add(regs.rip) & 0xffff_ffff,
        _ => regs.rip,
    }
}

thread_local! {
    static ASKER: RefCell<Option<Asker>> = const { RefCell::new(None) };
}

/// The vCPU that the calling thread runs; `None` in any other thread.
pub fn asker() -> Option<Asker> {
    ASKER.with_borrow(Clone::clone)
}

/// Forgets the thread's vCPU when it is dropped.
pub(super) struct Running;

/// Says which vCPU the calling thread runs until the guard is dropped.
pub(super) fn runs(vcpu: Asker) -> Running {
    ASKER.set(Some(vcpu));
    Running
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(ASKER.take());
    }
}
