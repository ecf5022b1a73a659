//! The console: its output has no private byte, and what is typed goes into shared pages only.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pagegate_core::devices::console::Console;
use pagegate_core::devices::virtio::console::VirtioConsole;

use crate::driver::Virtio;
use crate::{virtio, virtio_queue};

/// The driver of a queue: see [`virtio_queue::run_one_of_two`].
pub fn run(data: &[u8]) -> bool {
    static DEVICE: OnceLock<Mutex<(Virtio<'static>, Arc<Console>)>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| {
        let console = Arc::new(Console::default());
        let device = VirtioConsole::new(console.clone()).expect("a console");
        Mutex::new((Virtio::find(virtio::host(vec![Arc::new(device)]), 1), console))
    });
    let device = device.lock().unwrap_or_else(PoisonError::into_inner);
    let (device, console) = &*device;
    console.write(b"input");
    let completed = virtio_queue::run_one_of_two(data, device.host, device);
    assert!(
        !virtio::has_secret(&console.tail(usize::MAX)),
        "private bytes were output"
    );
    completed
}
