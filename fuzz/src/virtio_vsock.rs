//! Streams between the guest and programs of the host, of which one takes every stream to its port.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pagegate_core::devices::virtio::vsock::Vsock;

use crate::driver::Virtio;
use crate::{virtio, virtio_queue};

const GUEST: u32 = 3;
/// The program's port.
const PORT: u32 = 52;

/// The driver of a queue: see [`virtio_queue::run_one_of_two`].
pub fn run(data: &[u8]) -> bool {
    static DEVICE: OnceLock<Mutex<Virtio<'static>>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| Mutex::new(device()));
    let device = device.lock().unwrap_or_else(PoisonError::into_inner);
    virtio_queue::run_one_of_two(data, device.host, &device)
}

fn device() -> Virtio<'static> {
    let folder = std::env::temp_dir().join(format!("pagegate-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let path = folder.join("vsock");
    let program = UnixListener::bind(folder.join(format!("vsock_{PORT}"))).expect("a socket");
    std::thread::spawn(move || program.incoming().flatten().for_each(read));
    let listener = UnixListener::bind(&path).expect("a socket");
    let device = Vsock::new(GUEST, listener, path).expect("a device");
    Virtio::find(virtio::host(vec![Arc::new(device)]), 1)
}

/// Reads some of a stream, and ends it.
fn read(mut stream: std::os::unix::net::UnixStream) {
    let mut bytes = [0; 256];
    let _ = stream.set_read_timeout(Some(std::time::Duration::from_millis(1)));
    if let Ok(len) = stream.read(&mut bytes) {
        assert!(!virtio::has_secret(&bytes[..len]), "private bytes were sent");
    }
}
