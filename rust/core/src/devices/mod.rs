//! Devices: what answers a guest's port IO and MMIO.

pub mod bus;
