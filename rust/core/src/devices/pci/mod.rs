//! A PCI bus: bus 0, with a host bridge at device 0, and virtio devices from device 1 on.
//!
//! - [`bus`]: configuration access by ports, and the window of addresses in which devices have their registers
//! - [`config`]: the configuration space of a device
//! - [`msix`]: its interrupts, as messages; [`messages`]: the numbers that KVM knows them by

pub mod bus;
pub(crate) mod config;
pub(crate) mod messages;
pub(crate) mod msix;
