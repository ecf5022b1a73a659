//! What is done before a run: loading images, and setting registers.

use kvm_bindings::kvm_regs;
use parking_lot::MutexGuard;

use super::assembly::Machine;
use crate::boot::image::Image;
use crate::boot::long_mode;
use crate::boot::start::{self, CpuMode};
use crate::error::Error;
use crate::memory::address::{PAGE_SIZE, State};
use crate::memory::views::Views;
use crate::vcpu::state::VcpuState;

const VCPU_RUNNING: &str = "the vCPU is running: its registers can be read and set between runs only";

impl Machine {
    /// Copies an image into memory and returns its entry point. Its private pages become shared first: the host cannot
    /// write to them.
    ///
    /// # Errors
    /// `Invalid` for a segment outside of memory; those of [`Machine::convert`] and [`Machine::write`].
    pub fn load(&self, image: &Image<'_>) -> Result<u64, Error> {
        const ZEROES: [u8; 4096] = [0; 4096];
        for segment in &image.segments {
            let len = (segment.bytes.len() as u64).saturating_add(segment.zeroes);
            if len == 0 {
                continue;
            }
            let Some(pages) = self.memory.pages(segment.gpa, len) else {
                let (gpa, memory) = (segment.gpa, self.memory.size());
                let message = format!("the image's {len:#x} bytes at {gpa:#x} lie outside the guest's {memory:#x}");
                return Err(Error::Invalid(message));
            };
            self.convert(pages.gpa(), pages.size(), State::Shared)?;
            self.write(segment.gpa, segment.bytes)?;
            let mut at = segment.gpa + segment.bytes.len() as u64;
            let end = segment.gpa + len;
            while at < end {
                let part = (end - at).min(PAGE_SIZE);
                self.write(at, &ZEROES[..part as usize])?;
                at += part;
            }
        }
        Ok(image.entry)
    }

    /// Sets a vCPU's registers for its next run. If KVM still waits for an answer to the last exit, that is dropped.
    ///
    /// With a shared bit, `rip` becomes the address of its page in the view that the page is in: a fetch from the other
    /// view would be a request, and the code would be zeroes after the conversion.
    ///
    /// # Errors
    /// `Invalid` for a register that does not exist or a `rip` that the mode cannot have, `Busy` while the vCPU runs;
    /// those of building and writing the page tables.
    pub fn start(&self, vcpu: usize, mode: CpuMode, given: &[(String, u64)]) -> Result<(), Error> {
        let mut state = self.idle_vcpu(vcpu)?;
        let views = self.memory.views();
        let tables = match mode {
            CpuMode::Long => Some(long_mode::tables(views)?),
            CpuMode::Real | CpuMode::Protected => None,
        };
        let stack = tables.as_ref().map_or(0, |tables| stack(tables.gpa, vcpu, views));
        let mut sregs = start::sregs(mode, &state.reset_sregs, tables.as_ref(), views);
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
            self.write(tables.gpa, &tables.bytes)?;
        }
        state.abandon(&self.kicks[vcpu], self.memory.pause());
        let set = state.hv.set_sregs(&sregs).and_then(|()| state.hv.set_regs(&regs));
        let what = "set the vCPU's registers";
        set.map_err(|errno| Error::Host { what, errno })?;
        state.started = true;
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
