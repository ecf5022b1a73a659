//! What a device's thread needs of the run, and what becomes of an access to a private page.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;

use super::super::dma::{Dma, Flight, Gate, InFlight, Refused};
use crate::error::{Error, Failure};
use crate::events::event::ByDevice;
use crate::events::log::EventLog;
use crate::memory::guest_memory::GuestMemory;
use crate::policy::current::CurrentPolicy;
use crate::policy::decision::Decision;
use crate::policy::device_access::DeviceAccess;

/// Starts a thread with this body.
pub(crate) type Spawn = dyn Fn(Box<dyn FnOnce() + Send>) -> std::io::Result<JoinHandle<()>> + Send + Sync;

/// The parts of a run that devices need.
#[derive(Clone)]
pub struct Run {
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) policy: Arc<CurrentPolicy>,
    pub(crate) events: Arc<EventLog>,
    pub(crate) in_flight: Arc<InFlight>,
    pub(crate) accesses: Arc<Accesses>,
    /// Ends the run.
    pub(crate) end: Arc<dyn Fn(Result<String, Error>) + Send + Sync>,
    /// Starts a further thread of a device. Whoever starts it waits for it before the run is over.
    pub(crate) spawn: Arc<Spawn>,
    /// Whether it is ending.
    pub(crate) is_over: Arc<dyn Fn() -> bool + Send + Sync>,
}

/// The accesses of all devices in a run to what is not shared.
#[derive(Debug, Default)]
pub(crate) struct Accesses(Mutex<(u64, Option<DeviceAccess>)>);

impl Accesses {
    fn add(&self, access: &DeviceAccess) {
        let mut accesses = self.0.lock();
        accesses.0 += 1;
        accesses.1.get_or_insert_with(|| access.clone());
    }

    /// How many there were, and the first.
    pub(crate) fn take(&self) -> (u64, Option<DeviceAccess>) {
        std::mem::take(&mut *self.0.lock())
    }
}

/// Which device.
#[derive(Clone, Debug)]
pub struct Name {
    /// What it is called.
    pub name: Arc<str>,
    /// Its number on the bus.
    pub number: u32,
    /// The log has an event of each of its accesses, also to what is shared.
    pub(crate) logs_accesses: bool,
}

/// A device in a run.
pub(crate) struct Site {
    pub run: Run,
    pub device: Name,
    /// The driver waits for the device to let go of its memory.
    pub resetting: Arc<AtomicBool>,
}

/// Who accesses memory: a device, for the rings of a queue or for the buffers of one of its requests.
pub(crate) struct Accessor<'a> {
    site: &'a Site,
    queue: u16,
    descriptor: Cell<Option<u16>>,
    any_refused: Cell<bool>,
}

impl Accessor<'_> {
    /// Whether an access was refused, or is outside of memory.
    pub(crate) fn any_refused(&self) -> bool {
        self.any_refused.get()
    }

    /// From now on it is about the request whose first descriptor this is.
    pub(crate) fn of_request(&self, head: u16) {
        self.descriptor.set(Some(head));
    }
}

impl Site {
    /// Whether the device has to stop working on requests.
    pub(crate) fn must_pause(&self) -> bool {
        self.resetting.load(Ordering::SeqCst) || (self.run.is_over)()
    }

    /// The memory of a queue itself.
    pub(crate) fn rings(&self, queue: u16) -> Dma<'_, Accessor<'_>> {
        self.dma(queue, None, None)
    }

    /// The buffers of a request.
    pub(crate) fn buffers<'a>(&'a self, queue: u16, head: u16, flight: &'a Flight) -> Dma<'a, Accessor<'a>> {
        self.dma(queue, Some(head), Some(flight))
    }

    fn dma<'a>(&'a self, queue: u16, descriptor: Option<u16>, flight: Option<&'a Flight>) -> Dma<'a, Accessor<'a>> {
        Dma {
            memory: &self.run.memory,
            gate: Accessor {
                site: self,
                queue,
                descriptor: Cell::new(descriptor),
                any_refused: Cell::new(false),
            },
            flight,
        }
    }
}

impl Gate for Accessor<'_> {
    fn granted(&self, gpa: u64, size: u64, write: bool) {
        let (device, run) = (&self.site.device, &self.site.run);
        if device.logs_accesses {
            let by = ByDevice {
                number: device.number,
                queue: self.queue,
                descriptor: self.descriptor.get(),
                write,
            };
            run.events.device_access(&by, gpa & !run.memory.views().mask(), size);
        }
    }

    /// An access outside of memory is a mistake of the driver, and no matter of privacy: the request fails, and that is
    /// all.
    fn refused(&self, refused: Refused) {
        self.any_refused.set(true);
        let Some(state) = refused.state else {
            return;
        };
        let access = DeviceAccess {
            device: self.site.device.name.clone(),
            number: self.site.device.number,
            queue: self.queue,
            descriptor: self.descriptor.get(),
            gpa: refused.gpa & !self.site.run.memory.views().mask(),
            size: refused.size,
            write: refused.write,
            state,
        };
        let run = &self.site.run;
        run.accesses.add(&access);
        let judged = run.policy.present().device_access(&access);
        let judged = judged.and_then(|decision| match decision {
            Decision::Deny(_) | Decision::Stop(_) => Ok(decision),
            _ => Err::<_, Failure>("device_access answers with Deny or Stop".into()),
        });
        run.events.refused_access(&access, judged.as_ref().ok());
        match judged {
            Ok(Decision::Stop(reason)) => (run.end)(Ok(reason)),
            Ok(_) => {}
            Err(failure) => {
                let access = access.to_string();
                (run.end)(Err(Error::DeviceHook { access, failure }));
            }
        }
    }
}
