//! Putting a machine back to a snapshot, without making another one.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::manifest::Saved;
use super::resume::{Snapshot, damaged, of_another};
use crate::error::Error;
use crate::input::Watch;
use crate::machine::assembly::Machine;
use crate::machine::paging::{HANGS, NOT_LAZY};
use crate::memory::missing::pager::FilePager;
use crate::memory::missing::{Missing, PageBits};

/// What memory is put back to.
struct Memory {
    private: Vec<u8>,
    missing: [PageBits; 2],
    pager: FilePager,
}

impl Machine {
    /// Puts all of a machine that was resumed lazily back to a snapshot of it, or of one that was made alike: the next run goes
    /// on from there. What was touched since then is freed, and comes back from the folder when it is touched again, as after
    /// [`Bytes::Lazily`](super::resume::Bytes::Lazily). Devices are reset, and go on as they were in the snapshot.
    ///
    /// # Errors
    /// As [`Machine::resume`], and then nothing was changed; `Busy` while a pager hangs. After any other failure the machine
    /// is of no use until it was put back.
    pub fn reset_to(&self, snapshot: Snapshot, watch: &mut Watch<'_>) -> Result<(), Error> {
        self.outside_callbacks()?;
        let Snapshot {
            folder,
            manifest,
            saved,
        } = snapshot;
        if self.made != manifest.machine {
            return Err(Error::Invalid(format!(
                "{}: it is of a machine that was made with other parameters",
                folder.display()
            )));
        }
        let lazily = self
            .memory
            .missing()
            .filter(|_| !self.own_pager.load(Ordering::Relaxed));
        let Some(present) = lazily else {
            return Err(Error::NotSupported(NOT_LAZY.to_owned()));
        };
        let _still = self.current.still()?;
        let damaged = |why| damaged(&folder, why);
        self.check_shape(&saved).map_err(damaged)?;
        if let (Some(pc), Some(saved)) = (&self.pc, &saved.pc) {
            pc.check(saved)?;
        }
        if self.kernel().is_some() != manifest.sums.kernel.is_some() {
            return Err(damaged(of_another()));
        }
        for (index, saved) in saved.vcpus.iter().enumerate() {
            self.idle_vcpu(index)?.check(saved)?;
        }
        let private = self.private_bits_in(&folder, manifest.sums.pages, watch)?;
        if !self.memory.can_be_private(&private) {
            return Err(damaged(of_another()));
        }
        let (missing, pager) = self.missing_in(&folder, watch)?;
        if present.is_hanging() {
            return Err(Error::Busy(HANGS));
        }
        // While pages still come: KVM may have an instruction to complete.
        self.abandon()?;
        let memory = Memory {
            private,
            missing,
            pager,
        };
        let done = self.put_back(present, memory, saved, watch);
        if let Err(error) = &done {
            present.lose(&format!("it was not put back to its snapshot: {error}"));
        }
        done
    }

    /// Drops what KVM waits for, and closes what is open for vCPUs without paging.
    fn abandon(&self) -> Result<(), Error> {
        for (index, kick) in (0..self.vcpus.len()).zip(&self.kicks) {
            let mut vcpu = self.idle_vcpu(index)?;
            vcpu.abandon(kick, self.memory.pause());
            vcpu.unpaged = false;
            let what = "close pages that were open to a vCPU without paging";
            let closed = self.memory.close_unpaged(index as u32);
            closed.map_err(|errno| Error::Host { what, errno })?;
            drop(self.memory.take_closed(index as u32));
        }
        Ok(())
    }

    fn put_back(
        &self,
        present: &Arc<Missing>,
        memory: Memory,
        saved: Saved,
        watch: &mut Watch<'_>,
    ) -> Result<(), Error> {
        self.memory.change_private_bits(&memory.private, watch)?;
        self.begin_again(present, memory.missing, Arc::new(memory.pager))?;
        self.memory.set_kept(saved.kept);
        self.remind_policy(&saved.policy);
        self.bring_for_kvm(&saved, watch)?;
        for (index, saved) in saved.vcpus.iter().enumerate() {
            self.idle_vcpu(index)?.put_back(saved)?;
        }
        if let (Some(pc), Some(saved)) = (&self.pc, saved.pc) {
            pc.reset()?;
            pc.restore(saved)?;
        }
        let what = "set the guest's clock";
        let set = self.hypervisor.set_clock(&saved.clock);
        set.map_err(|errno| Error::Host { what, errno })
    }
}
