//! Virtio devices, as version 1.2 of their specification has them, on PCI.
//!
//! - [`device`]: what every device is; a file for each: [`block`], [`console`], [`net`], [`rng`],
//!   [`vsock`]
//! - [`queue`]: its queues and the requests in them, in guest memory that devices may reach
//! - `registers`: what driver and device agree on; `function`: where they are on PCI
//! - `worker`: the thread that a device has while the machine runs; `helpers`: further ones that a device may have; [`run`]:
//!   what they need of the run
//! - `saved`: a device in a snapshot

pub mod block;
pub mod console;
pub mod device;
pub(crate) mod function;
mod helpers;
pub mod net;
pub mod queue;
pub(crate) mod registers;
pub mod rng;
pub mod run;
pub(crate) mod saved;
pub mod vsock;
mod wake;
pub(crate) mod worker;
