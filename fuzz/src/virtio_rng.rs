//! The source of entropy.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pagegate_core::devices::virtio::rng::Rng;

use crate::driver::Virtio;
use crate::{virtio, virtio_queue};

/// The driver of a queue: see [`virtio_queue`].
pub fn run(data: &[u8]) -> bool {
    static DEVICE: OnceLock<Mutex<Virtio<'static>>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| Mutex::new(Virtio::find(virtio::host(vec![Arc::new(Rng)]), 1)));
    let device = device.lock().unwrap_or_else(PoisonError::into_inner);
    virtio_queue::run(data, device.host, &device)
}
