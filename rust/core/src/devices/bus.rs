//! The bus: which handler answers a port, or an MMIO range outside of guest memory.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::error::{Error, Failure};
use crate::hypervisor::exit::{Io, Mmio};
use crate::hypervisor::hypercall::DOORBELL_PORT;
use crate::memory::address::{Range, State};
use crate::memory::views::Views;

/// Answers port IO. Called on vCPU threads, several at once.
pub trait IoHandler: Send + Sync {
    /// `data` holds what an OUT wrote, or takes what an IN is to read: `io.len()` bytes.
    ///
    /// # Errors
    /// A failure ends the run.
    fn io(&self, vcpu: u32, io: &Io, data: &mut [u8]) -> Result<(), Failure>;
}

/// Answers MMIO. Called on vCPU threads, several at once.
pub trait MmioHandler: Send + Sync {
    /// `data` holds what a store wrote, or takes what a load is to read: `mmio.len` bytes.
    ///
    /// # Errors
    /// A failure ends the run.
    fn mmio(&self, vcpu: u32, mmio: &Mmio, data: &mut [u8]) -> Result<(), Failure>;
}

/// The size of a range in bytes, and its handler.
type MmioRange = (u64, Arc<dyn MmioHandler>);

/// The port that a vCPU used last, and its handler: a guest that uses a port uses it many times in a row.
#[derive(Default)]
pub(crate) struct KnownPort {
    port: u16,
    /// The bus's version when the handler was looked up.
    version: u64,
    handler: Option<Arc<dyn IoHandler>>,
}

#[derive(Default)]
pub(crate) struct Bus {
    ports: RwLock<HashMap<u16, Arc<dyn IoHandler>>>,
    /// Counts changes of `ports`, so that a [`KnownPort`] can tell whether it is out of date.
    version: AtomicU64,
    /// By the first gpa, without the view bit. No two overlap.
    mmio: RwLock<BTreeMap<u64, MmioRange>>,
}

impl Bus {
    /// The handler of a port, if it is the one that the calling vCPU used last.
    #[inline]
    pub(crate) fn handler_if_known<'a>(&self, port: u16, known: &'a KnownPort) -> Option<&'a dyn IoHandler> {
        let is_known = known.port == port && known.version == self.version.load(Ordering::Acquire);
        known.handler.as_deref().filter(|_| is_known)
    }

    /// The handler of a port. `known` is the calling vCPU's own; it spares the lock while the port stays the same.
    pub(crate) fn port<'a>(&self, port: u16, known: &'a mut KnownPort) -> Option<&'a dyn IoHandler> {
        // Acquire: the lookup below sees every change that this version counts.
        let version = self.version.load(Ordering::Acquire);
        if known.port != port || known.version != version {
            *known = KnownPort {
                port,
                version,
                handler: self.ports.read().get(&port).cloned(),
            };
        }
        known.handler.as_deref()
    }

    /// The handler of an access at `gpa`, which has no view bit, if one range holds all of it.
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
                self.version.fetch_add(1, Ordering::Release);
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
        // A device is reached through either view, so the view bit says nothing here.
        let start = gpa & !views.mask();
        let Some(end) = start.checked_add(size).filter(|_| size > 0) else {
            return invalid("is empty or wraps");
        };
        if ((end - 1) ^ start) & views.mask() != 0 {
            return invalid("crosses the bit that selects a view");
        }
        let views_of = |ram: &Range| [State::Shared, State::Private].map(|state| views.view(*ram, state));
        let overlaps = |view: Range| start < view.end() && view.gpa() < end;
        if views.ram().iter().flat_map(views_of).any(overlaps) {
            return invalid("overlaps guest memory; MMIO lies outside memory and its views");
        }
        let mut regions = self.mmio.write();
        let before = regions.range(..end).next_back();
        if before.is_some_and(|(other, (size, _))| start < other + size) {
            return invalid("overlaps another handler's");
        }
        regions.insert(start, (size, handler));
        Ok(())
    }

    /// Removes all handlers.
    pub(crate) fn clear(&self) {
        let ports = std::mem::take(&mut *self.ports.write());
        self.version.fetch_add(1, Ordering::Release);
        let mmio = std::mem::take(&mut *self.mmio.write());
        // Not with a lock held: it may run Python code.
        drop((ports, mmio));
    }
}
