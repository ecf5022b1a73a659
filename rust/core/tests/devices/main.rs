//! Devices, each by itself: a driver in the test does what a guest does.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod console;
mod port_io;
mod power;
mod serial;
mod serial_driver;
mod serial_hostile;
