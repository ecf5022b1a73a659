//! The kernel that a machine booted: its symbols at run time, wherever KASLR has put them.

use std::sync::OnceLock;
use std::time::Duration;

use parking_lot::Mutex;

use super::kernel_file::KernelFile;
use super::kernel_file::payload::vmlinux;
use super::kernel_file::symbols::Symbols;
use crate::error::{Error, Failure};
use crate::hypervisor::vm::Inspect;
use crate::input::Watch;

/// MSR_LSTAR: where SYSCALL enters the kernel.
const LSTAR: u32 = 0xc000_0082;
/// How long a thread waits for another that reads the symbols, between two calls of its watch.
const WAIT: Duration = Duration::from_millis(10);

/// A booted kernel. Its symbols are read when they are first asked for, by one thread. Others wait for it, and each is asked
/// again and again by its own watch whether it still wants them: a failure of that is returned, and nothing kept.
pub struct RunningKernel {
    file: KernelFile,
    /// `None` if the file has none, or they could not be read.
    symbols: OnceLock<Option<Symbols>>,
    /// Locked by the thread that reads them.
    reading: Mutex<()>,
    /// By how much it runs above the addresses that it is linked for. Known once a vCPU has loaded a descriptor table
    /// or an entry point that the symbols name.
    slide: OnceLock<u64>,
}

impl RunningKernel {
    /// A kernel of this file.
    pub fn new(file: KernelFile) -> Self {
        Self {
            file,
            symbols: OnceLock::new(),
            reading: Mutex::default(),
            slide: OnceLock::new(),
        }
    }

    /// Its file.
    pub fn file(&self) -> &KernelFile {
        &self.file
    }

    /// The kernel's symbols, if it has any.
    fn symbols(&self, watch: &mut Watch<'_>) -> Result<Option<&Symbols>, Failure> {
        loop {
            if let Some(known) = self.symbols.get() {
                return Ok(known.as_ref());
            }
            watch()?;
            let Some(_reading) = self.reading.try_lock_for(WAIT) else {
                continue;
            };
            if self.symbols.get().is_none() {
                let read = vmlinux(&self.file, watch).and_then(|vmlinux| Symbols::read(&vmlinux, watch));
                if let Err(Error::Interrupted(failure)) = read {
                    return Err(failure);
                }
                let _ = self.symbols.set(read.ok());
            }
        }
    }

    /// The function at a run-time address, and the offset in it, as "name+0x1f"; `None` outside of the kernel's text,
    /// without symbols, and as long as it is not known where the kernel runs. `vcpu` runs it, and is outside of
    /// KVM_RUN.
    ///
    /// # Errors
    /// A failure of `watch`, which is called again and again while the symbols are read.
    pub fn symbol(&self, rip: u64, vcpu: &dyn Inspect, watch: &mut Watch<'_>) -> Result<Option<String>, Failure> {
        let symbols = self.symbols(watch)?;
        let name = |symbols: &Symbols| {
            let (name, offset) = symbols.find(rip.checked_sub(self.slide(symbols, vcpu)?)?)?;
            Some(format!("{name}+{offset:#x}"))
        };
        Ok(symbols.and_then(name))
    }

    /// Up to `len` bytes of the kernel's text at a run-time address, as the image has them: the kernel patches some of
    /// its instructions when it boots.
    ///
    /// # Errors
    /// As [`RunningKernel::symbol`].
    pub fn code(
        &self,
        rip: u64,
        len: usize,
        vcpu: &dyn Inspect,
        watch: &mut Watch<'_>,
    ) -> Result<Option<&[u8]>, Failure> {
        let symbols = self.symbols(watch)?;
        let at = |symbols: &Symbols| rip.checked_sub(self.slide(symbols, vcpu)?);
        Ok(symbols.and_then(|symbols| symbols.code(at(symbols)?, len)))
    }

    fn slide(&self, symbols: &Symbols, vcpu: &dyn Inspect) -> Option<u64> {
        if let Some(slide) = self.slide.get() {
            return Some(*slide);
        }
        let idt = vcpu.sregs().ok()?.idt.base;
        let anchors = [
            ("entry_SYSCALL_64", vcpu.msr(LSTAR).unwrap_or_default()),
            ("idt_table", idt),
            ("bringup_idt_table", idt),
        ];
        let slide = symbols.slide(&anchors)?;
        Some(*self.slide.get_or_init(|| slide))
    }
}
