//! What a policy is asked when a device is told to access a private page.

use std::fmt;
use std::sync::Arc;

use crate::memory::address::State;

/// A device's access to a page that it must not reach, because its driver named it in a queue. Nothing was read or
/// written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceAccess {
    /// The device's name.
    pub device: Arc<str>,
    /// Its number on the PCI bus, from 1.
    pub number: u32,
    /// The index of the queue.
    pub queue: u16,
    /// The index of the first descriptor of the request that names the page; `None` for the queue's rings.
    pub descriptor: Option<u16>,
    /// The first byte that is not shared, without the view bit.
    pub gpa: u64,
    /// Bytes from there to the end of the access.
    pub size: u64,
    /// Whether the device was to write.
    pub write: bool,
    /// The state of the page at `gpa`. Shared if it was private for a moment since the request was made: what the driver
    /// put there is gone.
    pub state: State,
}

impl fmt::Display for DeviceAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = if self.write { "write" } else { "read" };
        write!(
            f,
            "device {} (00:{:02x}.0), queue {}",
            self.device, self.number, self.queue
        )?;
        match self.descriptor {
            Some(descriptor) => write!(f, ", descriptor {descriptor}")?,
            None => f.write_str(", its rings")?,
        }
        write!(
            f,
            ": {verb} of {} bytes at gpa {:#x}, which is {}",
            self.size,
            self.gpa,
            self.state.as_str()
        )
    }
}
