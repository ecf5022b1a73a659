//! What answers port IO and MMIO outside memory.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use parking_lot::RwLock;

use crate::decode::{Io, Mmio};
use crate::error::{Error, Failure};
use crate::explicit::DOORBELL_PORT;
use crate::views::Views;

/// Answers port IO. Called on vCPU threads.
pub trait IoHandler: Send + Sync {
    /// `data` is what a write wrote, or what a read is to read: `io.len()` bytes.
    ///
    /// # Errors
    /// A failure ends the run.
    fn io(&self, vcpu: u32, io: &Io, data: &mut [u8]) -> Result<(), Failure>;
}

/// Answers MMIO. Called on vCPU threads.
pub trait MmioHandler: Send + Sync {
    /// `data` is what a store stored, or what a load is to load: `mmio.len` bytes.
    ///
    /// # Errors
    /// A failure ends the run.
    fn mmio(&self, vcpu: u32, mmio: &Mmio, data: &mut [u8]) -> Result<(), Failure>;
}

/// Bytes, and who answers there.
type Region = (u64, Arc<dyn MmioHandler>);

#[derive(Default)]
pub(crate) struct Devices {
    ports: RwLock<HashMap<u16, Arc<dyn IoHandler>>>,
    mmio: RwLock<BTreeMap<u64, Region>>,
}

impl Devices {
    pub(crate) fn port(&self, port: u16) -> Option<Arc<dyn IoHandler>> {
        self.ports.read().get(&port).cloned()
    }

    pub(crate) fn mmio(&self, gpa: u64, len: u64) -> Option<Arc<dyn MmioHandler>> {
        let regions = self.mmio.read();
        let (start, (size, handler)) = regions.range(..=gpa).next_back()?;
        let end = (gpa - start).checked_add(len)?;
        (end <= *size).then(|| handler.clone())
    }

    pub(crate) fn on_io(&self, port: u16, handler: Arc<dyn IoHandler>) -> Result<(), Error> {
        if port == DOORBELL_PORT {
            let message = format!("port {port:#x} is the doorbell of explicit requests; choose another");
            return Err(Error::Invalid(message));
        }
        match self.ports.write().entry(port) {
            Entry::Vacant(free) => {
                free.insert(handler);
                Ok(())
            }
            Entry::Occupied(_) => Err(Error::Invalid(format!("port {port:#x} already has a handler"))),
        }
    }

    pub(crate) fn on_mmio(
        &self,
        gpa: u64,
        size: u64,
        views: &Views,
        handler: Arc<dyn MmioHandler>,
    ) -> Result<(), Error> {
        let invalid = |why: &str| Err(Error::Invalid(format!("MMIO range {gpa:#x} + {size:#x} {why}")));
        let Some(end) = gpa.checked_add(size).filter(|_| size > 0) else {
            return invalid("is empty or wraps");
        };
        let shared = views.shared_mask();
        let overlaps = |start: u64| gpa < start + views.size() && start < end;
        if overlaps(0) || overlaps(shared) {
            return invalid("overlaps guest memory; MMIO lies outside memory and its views");
        }
        let mut regions = self.mmio.write();
        let before = regions.range(..end).next_back();
        if before.is_some_and(|(start, (size, _))| gpa < start + size) {
            return invalid("overlaps another handler's");
        }
        regions.insert(gpa, (size, handler));
        Ok(())
    }

    /// Lets go of all handlers.
    pub(crate) fn clear(&self) {
        self.ports.write().clear();
        self.mmio.write().clear();
    }
}
