//! Booting Linux: kernel, initrd and command line into memory, and the registers of the first vCPU.

use std::borrow::Cow;
use std::sync::Arc;

use kvm_bindings::kvm_regs;
use vm_memory::mmap::{FromRangesError, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::assembly::Machine;
use super::pc::Pc;
use crate::boot::kernel_file::KernelFile;
use crate::boot::kernel_file::payload::vmlinux;
use crate::boot::linux::LinuxGuest;
use crate::boot::running_kernel::RunningKernel;
use crate::boot::start;
use crate::devices::console::Console;
use crate::errno::Errno;
use crate::error::Error;
use crate::hypervisor::host::EnforcementMode;
use crate::input::Watch;
use crate::memory::address::{Range, State};
use crate::x86::registers::RFLAGS_FIXED;

const NO_PC: &str = "this machine has platform=\"bare\", and Linux needs platform=\"pc\"";

impl Machine {
    /// Loads a kernel, so that the next run boots it. All vCPUs are started: the others wait for the first one's INIT
    /// and SIPI. A confidential guest gets everything in its private memory, which its owner would have measured.
    ///
    /// # Errors
    /// `Invalid` for a kernel, an initrd or a command line that does not fit, `Busy` on a bare platform, for a second
    /// boot, or while the machine runs; `NotSupported` with a pager; `Interrupted` for a failure of `watch`, which is called again and again.
    pub fn boot(
        &self,
        kernel: KernelFile,
        initrd: Option<&[u8]>,
        command_line: &str,
        watch: &mut Watch<'_>,
    ) -> Result<(), Error> {
        let pc = self.pc()?;
        if self.memory.missing().is_some() {
            return Err(Error::NotSupported(
                "a kernel is loaded past the pager: boot it in a machine without one, put that aside before its first run, \
                 and resume it with the pager"
                    .to_owned(),
            ));
        }
        let idle = (0..self.vcpus.len()).map(|vcpu| self.idle_vcpu(vcpu));
        let mut vcpus = idle.collect::<Result<Vec<_>, _>>()?;
        if pc.kernel.lock().is_some() {
            let why = "this machine has booted a kernel already: make another one";
            return Err(Error::Busy(why));
        }
        if self.memory.generation() != 0 {
            let why = "this machine's memory was converted or loaded already: boot() needs a new one";
            return Err(Error::Busy(why));
        }
        let first = &mut vcpus[0];
        let views = self.memory.views();
        let state = match self.sev {
            Some(_) => State::Private,
            None => State::Shared,
        };
        let ram = views.ram();
        let memory = self.whole_side(state)?;
        let inside = self.decompressed(&kernel, watch)?;
        let guest = LinuxGuest {
            kernel: inside.as_deref().unwrap_or(kernel.bytes()),
            is_bzimage: inside.is_none() && kernel.is_bzimage(),
            initrd,
            command_line,
            ram: &ram,
            vcpus: self.vcpus.len() as u32,
            private_bit: self.sev.map(|sev| sev.private_bit),
            pci: !pc.devices().is_empty(),
        };
        let entry = guest.load(&memory, watch)?;
        let sregs = start::linux_sregs(&first.reset_sregs, &entry);
        let regs = kvm_regs {
            rip: entry.rip,
            rsp: entry.rsp,
            rsi: entry.rsi,
            rflags: RFLAGS_FIXED,
            ..Default::default()
        };
        let set = first.hv.set_sregs(&sregs).and_then(|()| first.hv.set_regs(&regs));
        let what = "set the vCPU's registers";
        set.map_err(|errno| Error::Host { what, errno })?;
        for vcpu in &mut vcpus {
            vcpu.started = true;
        }
        *pc.kernel.lock() = Some(Arc::new(RunningKernel::new(kernel)));
        Ok(())
    }

    /// The vmlinux inside of a bzImage, where the guest cannot decompress it itself: a SEV guest does that through page
    /// tables without C-bits, which under memslots KVM cannot walk (`memory/enforcement/unpaged.rs`).
    fn decompressed<'a>(&self, kernel: &'a KernelFile, watch: &mut Watch<'_>) -> Result<Option<Cow<'a, [u8]>>, Error> {
        if self.sev.is_none() || self.enforcement() != EnforcementMode::Memslots || !kernel.is_bzimage() {
            return Ok(None);
        }
        vmlinux(kernel, watch).map(Some).map_err(|error| match error {
            Error::Invalid(why) => Error::Invalid(format!(
                "{why}; under enforcement=\"memslots\" give the vmlinux inside of it"
            )),
            other => other,
        })
    }

    /// One side of all memory, for the loader. No page of it has been used, and no vCPU has run.
    fn whole_side(&self, state: State) -> Result<GuestMemoryMmap, Error> {
        let file = self.memory.sides().of(state).file();
        let part = |ram: Range| {
            let offset = FileOffset::from_arc(file.clone(), ram.gpa());
            (GuestAddress(ram.gpa()), ram.size() as usize, Some(offset))
        };
        let parts: Vec<_> = self.memory.views().ram().into_iter().map(part).collect();
        GuestMemoryMmap::from_ranges_with_files(parts).map_err(|error| match error {
            FromRangesError::MmapRegion(MmapRegionError::Mmap(error)) => Error::Host {
                what: "map the guest's memory to load its kernel",
                errno: Errno(error.raw_os_error().unwrap_or(libc::EIO)),
            },
            error => Error::Invalid(format!(
                "the guest's memory cannot be mapped to load its kernel: {error}"
            )),
        })
    }

    /// What the guest writes to its serial port, and reads from it.
    ///
    /// # Errors
    /// `Busy` on a bare platform.
    pub fn console(&self) -> Result<&Arc<Console>, Error> {
        Ok(&self.pc()?.console)
    }

    /// The kernel that was booted.
    pub fn kernel(&self) -> Option<Arc<RunningKernel>> {
        self.pc.as_ref().and_then(|pc| pc.kernel.lock().clone())
    }

    /// The function at an address of the booted kernel, as "name+0x1f"; `None` where it is not known.
    ///
    /// # Errors
    /// `Busy` while the machine runs; `Interrupted` for a failure of `watch`, which is called again and again while the
    /// symbols are read.
    pub fn symbol(&self, rip: u64, watch: &mut Watch<'_>) -> Result<Option<String>, Error> {
        let vcpu = self.idle_vcpu(0)?.hv.inspect();
        match self.kernel() {
            Some(kernel) => kernel.symbol(rip, vcpu.as_ref(), watch).map_err(Error::Interrupted),
            None => Ok(None),
        }
    }

    pub(super) fn pc(&self) -> Result<&Pc, Error> {
        self.pc.as_ref().ok_or(Error::Busy(NO_PC))
    }
}
