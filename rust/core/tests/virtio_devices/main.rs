//! Virtio devices in a machine without KVM, whose driver is the test.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod console;
#[path = "../virtio/driver.rs"]
#[allow(dead_code)]
mod driver;
mod net;
mod requests;
#[path = "../virtio/rings.rs"]
#[allow(dead_code)]
mod rings;
mod vsock;
mod vsock_guest;
