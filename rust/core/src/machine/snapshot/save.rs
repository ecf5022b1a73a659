//! Putting a machine aside.

use std::hash::Hasher;
use std::path::Path;

use twox_hash::XxHash3_64;

use super::folder::NewFolder;
use super::manifest::{FORMAT, Manifest, Saved, Sums, name};
use crate::error::Error;
use crate::input::Watch;
use crate::machine::assembly::Machine;
use crate::memory::address::State;
use crate::vcpu::saved::SavedVcpu;

impl Machine {
    /// Writes all of the machine to a new folder, of which only its owner can read anything: memory, private pages
    /// included, the states of pages, vCPUs, interrupt controllers, clock and devices. Between runs, when no device works on
    /// a request. The machine can run on.
    ///
    /// The folder is there when all of it is written, and not before.
    ///
    /// # Errors
    /// `NotSupported` for private memory that the host cannot read, and while a store of a vCPU is not answered; `Busy` while
    /// it runs, is closed, and when called from a listener; `File` for a folder that is there already or cannot be written;
    /// `Device` for what a device raises; `Host` where an ioctl fails; `Interrupted` for a failure of `watch`.
    pub fn snapshot(&self, folder: &Path, watch: &mut Watch<'_>) -> Result<(), Error> {
        self.outside_callbacks()?;
        if !self.memory.can_be_saved() {
            return Err(Error::NotSupported(
                "the private pages are in a guest_memfd that the host can neither read nor fill: a machine with \
                 enforcement=\"traps\" or \"memslots\" can be put aside"
                    .to_owned(),
            ));
        }
        let _still = self.current.still()?;
        let new = NewFolder::new(folder)?;
        // Before a vCPU is locked: a device may call Python.
        let pc = self.pc.as_ref().map(|pc| pc.save()).transpose()?;
        let failed = |what| move |errno| Error::Host { what, errno };
        let saved = Saved {
            vcpus: self.save_vcpus()?,
            clock: self.hypervisor.clock().map_err(failed("read the guest's clock"))?,
            pc,
            kept: self.memory.has_kept(),
            policy: self.policy_knows(),
        };
        let state = as_json(&saved)?;
        new.write(name::STATE, &state)?;
        // The pager's thread needs no page held.
        self.memory.bring_all(watch)?;
        let held = self.memory.hold_all();
        let pages = self.memory.private_bits()?;
        let mut side = |state, name| {
            let file = new.file(name)?;
            let sum = self.memory.save_side(state, &file, &new.path(name), watch)?;
            new.sync(&file, name)?;
            Ok::<_, Error>(sum)
        };
        let (shared, private) = (side(State::Shared, name::SHARED)?, side(State::Private, name::PRIVATE)?);
        drop(held);
        new.write(name::PAGES, &pages)?;
        let kernel = self.kernel();
        let kernel = kernel.as_ref().map(|kernel| kernel.file().bytes());
        if let Some(kernel) = kernel {
            new.write(name::KERNEL, kernel)?;
        }
        let manifest = Manifest {
            format: FORMAT,
            pagegate: env!("CARGO_PKG_VERSION").to_owned(),
            machine: self.made.clone(),
            sums: Sums {
                state: sum(&state),
                pages: sum(&pages),
                shared,
                private,
                kernel: kernel.map(sum),
            },
        };
        new.write(name::MANIFEST, &as_json(&manifest)?)?;
        new.finish()
    }

    fn save_vcpus(&self) -> Result<Vec<SavedVcpu>, Error> {
        let what = "list the MSRs";
        let msrs = self.hypervisor.msr_indices();
        let msrs = msrs.map_err(|errno| Error::Host { what, errno })?;
        let save = |index| {
            let mut vcpu = self.idle_vcpu(index)?;
            vcpu.settle(&self.kicks[index], self.memory.pause());
            vcpu.save(&msrs, self.pc.is_some())
        };
        (0..self.vcpus.len()).map(save).collect()
    }
}

fn as_json(value: &impl serde::Serialize) -> Result<Vec<u8>, Error> {
    serde_json::to_vec(value).map_err(|error| Error::Invalid(format!("the machine's state cannot be written: {error}")))
}

pub(super) fn sum(bytes: &[u8]) -> u64 {
    let mut sum = XxHash3_64::new();
    sum.write(bytes);
    sum.finish()
}
