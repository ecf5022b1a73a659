//! The network card: no frame has a private byte.

use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pagegate_core::devices::virtio::net::Net;

use crate::driver::Virtio;
use crate::{virtio, virtio_queue};

/// The driver of a queue: see [`virtio_queue::run_one_of_two`].
pub fn run(data: &[u8]) -> bool {
    static DEVICE: OnceLock<Mutex<(Virtio<'static>, UnixDatagram)>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| {
        let (network, link) = UnixDatagram::pair().expect("a socket");
        network.set_nonblocking(true).expect("a socket");
        let device = Net::new(link.into(), None).expect("a card");
        Mutex::new((Virtio::find(virtio::host(vec![Arc::new(device)]), 1), network))
    });
    let device = device.lock().unwrap_or_else(PoisonError::into_inner);
    let (device, network) = &*device;
    // It may wait for frames to be received.
    let _ = network.send(&[0x11; 60]);
    let completed = virtio_queue::run_one_of_two(data, device.host, device);
    let mut frame = vec![0; 1 << 16];
    while let Ok(len) = network.recv(&mut frame) {
        assert!(!virtio::has_secret(&frame[..len]), "private bytes were sent");
    }
    completed
}
