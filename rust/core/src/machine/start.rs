//! What is done before a run: loading images, and setting registers.

use kvm_bindings::{kvm_regs, kvm_sregs};
use parking_lot::MutexGuard;

use super::assembly::Machine;
use crate::boot::image::{Image, Segment};
use crate::boot::long_mode;
use crate::boot::start::{self, CpuMode};
use crate::error::Error;
use crate::input::Watch;
use crate::memory::address::{PAGE_SIZE, State};
use crate::memory::views::Views;
use crate::vcpu::state::VcpuState;

const VCPU_RUNNING: &str = "the vCPU is running: its registers can be read and set between runs only";

/// How much of an image is loaded between two calls of the watch.
const LOADED_AT_ONCE: u64 = 64 << 20;

impl Machine {
    /// Copies an image into memory and returns its entry point. Its private pages become shared first: the host cannot
    /// write to them. `watch` is called again and again, for an image can be as large as memory.
    ///
    /// # Errors
    /// `Invalid` for a segment outside of memory, and then nothing is written; those of [`Machine::convert`] and
    /// [`Machine::write`]; `Interrupted` for a failure of `watch`, after which a part of the image is in memory.
    pub fn load(&self, image: &Image<'_>, watch: &mut Watch<'_>) -> Result<u64, Error> {
        for segment in image.segments.iter().filter(|segment| !segment.is_empty()) {
            if self.memory.pages(segment.gpa, segment.len()).is_none() {
                let (gpa, len, memory) = (segment.gpa, segment.len(), self.memory.size());
                let message = format!("the image's {len:#x} bytes at {gpa:#x} lie outside the guest's {memory:#x}");
                return Err(Error::Invalid(message));
            }
        }
        for segment in &image.segments {
            self.load_segment(segment, watch)?;
        }
        Ok(image.entry)
    }

    fn load_segment(&self, segment: &Segment<'_>, watch: &mut Watch<'_>) -> Result<(), Error> {
        static ZEROES: [u8; 1 << 16] = [0; 1 << 16];
        let (mut at, end) = (segment.gpa, segment.gpa + segment.len());
        let mut rest = segment.bytes;
        while at < end {
            watch().map_err(Error::Interrupted)?;
            let part_end = end.min((at - at % LOADED_AT_ONCE) + LOADED_AT_ONCE);
            if let Some(pages) = self.memory.pages(at, part_end - at) {
                self.convert(pages.gpa(), pages.size(), State::Shared)?;
            }
            while at < part_end {
                let len = ((part_end - at).min(ZEROES.len() as u64)) as usize;
                let part = match rest.is_empty() {
                    true => &ZEROES[..len],
                    false => &rest[..len.min(rest.len())],
                };
                self.bring(at, part.len() as u64, watch)?;
                self.write(at, part)?;
                rest = &rest[part.len().min(rest.len())..];
                at += part.len() as u64;
            }
        }
        Ok(())
    }

    /// Sets a vCPU's registers for its next run. If KVM still waits for an answer to the last exit, that is dropped.
    ///
    /// With two views, `rip` becomes the address of its page in the view that the page is in: a fetch from the other
    /// view would be a request, and the code would be zeroes after the conversion.
    ///
    /// # Errors
    /// `Invalid` for a register that does not exist or a `rip` that the mode cannot have, `Busy` while the vCPU runs;
    /// those of building and writing the page tables; `Interrupted` for a failure of `watch`, which is called while a pager has
    /// not given the pages that those come to.
    pub fn start(
        &self,
        vcpu: usize,
        mode: CpuMode,
        given: &[(String, u64)],
        watch: &mut Watch<'_>,
    ) -> Result<(), Error> {
        let reset_sregs = self.idle_vcpu(vcpu)?.reset_sregs;
        let views = self.memory.views();
        let tables = match mode {
            CpuMode::Long => Some(long_mode::tables(*views, self.gib_pages)?),
            CpuMode::Real | CpuMode::Protected => None,
        };
        let stack = tables.as_ref().map_or(0, |tables| stack(tables.gpa, vcpu, *views));
        let mut sregs = start::sregs(mode, &reset_sregs, tables.as_ref(), *views);
        let mut regs = start::regs(given, stack, &mut sregs)?;
        if let Some(place) = views.locate(regs.rip)
            && self.memory.state(place.gpa) == State::Shared
        {
            regs.rip = views.address(place.gpa, State::Shared);
        }
        let end = mode.rip_end();
        if regs.rip >= end {
            let message = format!(
                "rip {:#x} cannot be reached in this mode, which ends at {end:#x}: use mode \"long\"",
                regs.rip
            );
            return Err(Error::Invalid(message));
        }
        if let Some(tables) = &tables {
            self.convert(tables.gpa, tables.bytes.len() as u64, State::Shared)?;
            self.bring(tables.gpa, tables.bytes.len() as u64, watch)?;
            self.write(tables.gpa, &tables.bytes)?;
        }
        // Only now: a listener that is told of the conversion may do anything, and run() waits for the vCPU.
        let mut state = self.idle_vcpu(vcpu)?;
        state.abandon(&self.kicks[vcpu], self.memory.pause());
        let set = state.hv.set_sregs(&sregs).and_then(|()| state.hv.set_regs(&regs));
        let what = "set the vCPU's registers";
        set.map_err(|errno| Error::Host { what, errno })?;
        state.started = true;
        state.halted = false;
        Ok(())
    }

    /// A vCPU's general registers, between runs (KVM_GET_REGS).
    ///
    /// # Errors
    /// `Busy` while it runs, `Invalid` for a vCPU that there is not.
    pub fn regs(&self, vcpu: usize) -> Result<kvm_regs, Error> {
        let what = "read the vCPU's registers";
        let state = self.idle_vcpu(vcpu)?;
        state.hv.regs().map_err(|errno| Error::Host { what, errno })
    }

    /// A vCPU's special registers, between runs (KVM_GET_SREGS).
    ///
    /// # Errors
    /// As [`Machine::regs`].
    pub fn sregs(&self, vcpu: usize) -> Result<kvm_sregs, Error> {
        let what = "read the vCPU's registers";
        let state = self.idle_vcpu(vcpu)?;
        state.hv.sregs().map_err(|errno| Error::Host { what, errno })
    }

    /// A vCPU that no run uses, locked.
    pub(super) fn idle_vcpu(&self, vcpu: usize) -> Result<MutexGuard<'_, VcpuState>, Error> {
        let Some(vcpu) = self.vcpus.get(vcpu) else {
            let message = format!(
                "there are {} vCPUs, so the last is {}",
                self.vcpus.len(),
                self.vcpus.len() - 1
            );
            return Err(Error::Invalid(message));
        };
        vcpu.try_lock().ok_or(Error::Busy(VCPU_RUNNING))
    }
}

/// The initial RSP of a vCPU: below the page tables, with a page for each vCPU, in the shared view.
fn stack(tables: u64, vcpu: usize, views: Views) -> u64 {
    let below = tables.saturating_sub(vcpu as u64 * PAGE_SIZE);
    views.address(below, State::Shared)
}
