//! What every virtio device is.

use std::os::fd::BorrowedFd;

use vmm_sys_util::epoll::EventSet;

use super::queue::Queue;
use crate::error::Failure;

/// The most queues of a device.
pub const MOST_QUEUES: usize = 64;
/// The largest queue. It bounds what a driver can have a device keep: so many requests, each of so many buffers.
pub const LARGEST_QUEUE: u16 = 1024;

/// Something outside of the guest that a device waits for.
pub struct Source<'a> {
    /// What is waited for.
    pub fd: BorrowedFd<'a>,
    /// Until it is readable, or writable.
    pub events: EventSet,
    /// The queue that [`Device::process`] is then called for.
    pub queue: usize,
}

/// A virtio device. All but the configuration space is used by the device's own thread alone.
pub trait Device: Send + Sync {
    /// Its type's number, as "Device Types" of the specification has it.
    fn id(&self) -> u16;

    /// The base class and subclass that it has on PCI.
    fn class(&self) -> u16 {
        0xff00
    }

    /// The features that it offers, of those that belong to its type.
    fn features(&self) -> u64 {
        0
    }

    /// The largest size of each of its queues: powers of two, [`LARGEST_QUEUE`] at most. [`MOST_QUEUES`] at most.
    fn queues(&self) -> &[u16];

    /// Its configuration space as it is now. Asked when the device is added, and when somebody says that it has changed.
    ///
    /// # Errors
    /// A failure is returned to whoever added it or said so.
    fn config(&self) -> Result<Vec<u8>, Failure> {
        Ok(Vec::new())
    }

    /// Writes to its configuration space. Called on vCPU threads.
    ///
    /// # Errors
    /// A failure ends the run.
    fn write_config(&self, offset: usize, from: &[u8]) -> Result<(), Failure> {
        let _ = (offset, from);
        Ok(())
    }

    /// The driver is ready, and has accepted these features.
    ///
    /// # Errors
    /// A failure ends the run.
    fn activate(&self, features: u64) -> Result<(), Failure> {
        let _ = features;
        Ok(())
    }

    /// There may be requests in queue `index`, or one of [`Device::sources`] is ready.
    ///
    /// # Errors
    /// A failure ends the run.
    fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure>;

    /// Whether its configuration space changed by itself since it was last asked, after each turn.
    fn config_changed(&self) -> bool {
        false
    }

    /// What to wait for besides requests, asked again before each wait.
    fn sources(&self) -> Vec<Source<'_>> {
        Vec::new()
    }

    /// What the host does for one of its requests right now, in a word such as "write", if that can take as long as the host
    /// likes. Asked by any thread.
    fn under_way(&self) -> Option<&'static str> {
        None
    }

    /// It has to let go of guest memory, because the run is over or the driver has given it up: it waits for what other threads
    /// than its own do for requests, and completes these.
    fn settle(&self, queues: &mut Vec<Queue>) {
        let _ = queues;
    }

    /// What it has to know again in a machine that is resumed from a snapshot. Called between runs.
    ///
    /// # Errors
    /// A failure is returned to whoever makes the snapshot.
    fn save(&self) -> Result<Vec<u8>, Failure> {
        Ok(Vec::new())
    }

    /// What [`Device::save`] gave, after [`Device::activate`] if its driver was ready. Called before the first run.
    ///
    /// # Errors
    /// A failure is returned to whoever resumes the machine.
    fn restore(&self, state: &[u8]) -> Result<(), Failure> {
        let _ = state;
        Ok(())
    }

    /// The driver has reset it: it forgets everything that it had from it.
    ///
    /// # Errors
    /// A failure ends the run.
    fn reset(&self) -> Result<(), Failure> {
        Ok(())
    }
}
