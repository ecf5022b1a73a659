//! A device of a machine that is put aside: what its driver has set, and how far its queues have come.
//!
//! Between runs no request is under way: each was completed, or is still in its queue.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue as Ring, QueueState};

use super::function::VirtioFunction;
use super::registers::SavedRegisters;
use crate::devices::pci::msix::SavedMsix;
use crate::error::{Error, Failure};

/// One device.
#[derive(Deserialize, Serialize)]
pub(crate) struct SavedDevice {
    /// What it was called.
    pub name: String,
    /// Its type's number.
    pub id: u16,
    /// Whether each of its accesses has an event.
    pub logs_accesses: bool,
    config: Vec<u8>,
    registers: SavedRegisters,
    msix: SavedMsix,
    isr: u8,
    space: Vec<u8>,
    generation: u8,
    rings: Option<Vec<SavedRing>>,
    state: Vec<u8>,
}

/// How far a queue has come, and where it is.
#[derive(Deserialize, Serialize)]
struct SavedRing {
    max_size: u16,
    next_avail: u16,
    next_used: u16,
    event_idx_enabled: bool,
    size: u16,
    ready: bool,
    desc_table: u64,
    avail_ring: u64,
    used_ring: u64,
}

impl SavedRing {
    fn of(ring: &Ring) -> Self {
        let state = ring.state();
        Self {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx_enabled,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }

    fn ring(&self) -> Option<Ring> {
        let state = QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx_enabled,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        };
        Ring::try_from(state).ok()
    }
}

impl VirtioFunction {
    /// Its state, between runs.
    pub(crate) fn save(&self) -> Result<SavedDevice, Error> {
        // Without a lock: it may call Python.
        let state = self.device.save().map_err(|failure| self.failed(failure))?;
        let (space, generation) = self.space();
        let rings = self.rings.lock();
        Ok(SavedDevice {
            name: (*self.name.name).to_owned(),
            id: self.device.id(),
            logs_accesses: self.name.logs_accesses,
            config: self.config.lock().bytes().to_vec(),
            registers: self.registers.lock().save(),
            msix: self.msix.lock().save(),
            isr: self.isr.load(Ordering::SeqCst),
            space,
            generation,
            rings: rings.as_ref().map(|rings| rings.iter().map(SavedRing::of).collect()),
            state,
        })
    }

    /// Takes a state that was saved, for the first run of a machine that is resumed.
    ///
    /// # Errors
    /// `Invalid` for the state of another device; `Device` for what it raises; `Host` where KVM refuses an interrupt.
    pub(crate) fn restore(&self, saved: SavedDevice) -> Result<(), Error> {
        self.check(&saved)?;
        let other = |why| self.other(why);
        self.registers.lock().restore(saved.registers).map_err(other)?;
        if !self.msix.lock().restore(&saved.msix) {
            return Err(other("it has another number of interrupts".to_owned()));
        }
        let mut config = self.config.lock();
        config.write(0, &saved.config);
        self.place(&config).map_err(|failure| self.failed(failure))?;
        drop(config);
        let rings = saved
            .rings
            .map(|rings| rings.iter().map(SavedRing::ring).collect::<Option<Vec<_>>>());
        let rings = match rings {
            Some(None) => return Err(other("a queue lies where none can be".to_owned())),
            Some(Some(rings)) if rings.len() != self.kicks.len() => {
                return Err(other("its queues are others".to_owned()));
            }
            rings => rings.flatten(),
        };
        let features = self.registers.lock().accepted();
        let in_use = rings.is_some();
        *self.rings.lock() = rings;
        if in_use {
            self.device.activate(features).map_err(|failure| self.failed(failure))?;
        }
        self.device
            .restore(&saved.state)
            .map_err(|failure| self.failed(failure))?;
        self.isr.store(saved.isr, Ordering::SeqCst);
        self.continue_space(&saved.space, saved.generation);
        if in_use {
            // One that was on its way to the interrupt controllers when they were saved; a driver takes one too many.
            (0..self.kicks.len()).for_each(|queue| self.interrupt(queue as u16));
        }
        Ok(())
    }

    /// Whether the state is that of a device of this type.
    pub(crate) fn check(&self, saved: &SavedDevice) -> Result<(), Error> {
        match self.device.id() {
            id if id == saved.id => Ok(()),
            id => Err(self.other(format!("it is of type {id}, not {}", saved.id))),
        }
    }

    fn other(&self, why: String) -> Error {
        Error::Invalid(format!("device {}: {why}", self.name.name))
    }

    /// Resets it between runs, as its driver can in one.
    ///
    /// # Errors
    /// `Device` for what it raises.
    pub(crate) fn reset(&self) -> Result<(), Error> {
        // Without a lock: it may call Python.
        let reset = self.device.reset();
        drop(self.rings.lock().take());
        self.forget();
        reset.map_err(|failure| self.failed(failure))
    }

    fn failed(&self, failure: Failure) -> Error {
        Error::Device {
            device: self.name.name.clone(),
            failure,
        }
    }
}
