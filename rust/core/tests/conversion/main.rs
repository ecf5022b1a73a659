//! Conversions by the host, over each way of enforcement: what the map says, what KVM was told, and which bytes are
//! there.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod model;
#[path = "../common/random.rs"]
mod random;
mod setup;

mod bytes;
mod failures;
mod operations;
mod threads;
