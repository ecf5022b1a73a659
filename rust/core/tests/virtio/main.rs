//! Virtio devices on the PCI bus: a driver in the test does what a guest does, or what none should.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod at_once;
mod block;
mod config_changes;
mod config_space;
mod driver;
mod ending;
mod hostile_rings;
mod in_flight;
mod interrupts;
mod private_pages;
#[path = "../common/random.rs"]
mod random;
mod registers;
mod rings;
mod test_devices;
mod two_queues;
