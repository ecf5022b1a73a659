//! What a guest reaches by port IO and MMIO.

pub mod bus;
