//! Devices: what answers a guest's port IO and MMIO.
//!
//! - [`bus`]: which handler is asked
//! - [`serial`], [`console`]: COM1, and what is at its other end; [`power`]: the ports by which a guest ends its machine
//! - [`pci`], [`virtio`]: virtio devices on a PCI bus; `dma`: guest memory as they reach it

pub mod bus;
pub mod console;
pub(crate) mod dma;
pub mod pci;
pub mod power;
pub mod serial;
pub mod virtio;
