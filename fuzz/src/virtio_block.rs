//! The disk: it gets no private byte, and stays as large as it is.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pagegate_core::devices::virtio::block::Block;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::driver::{Host, Virtio};
use crate::{virtio, virtio_queue};

const SIZE: usize = 64 * 512;

struct Disk {
    host: &'static Host,
    device: Virtio<'static>,
    file: File,
}

/// The driver of a queue: see [`virtio_queue`].
pub fn run(data: &[u8]) -> bool {
    static DISK: OnceLock<Mutex<Disk>> = OnceLock::new();
    let disk = DISK.get_or_init(|| Mutex::new(disk()));
    let disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
    disk.file.write_all_at(&[0; SIZE], 0).expect("the disk can be written");
    let completed = virtio_queue::run(data, disk.host, &disk.device);
    let mut content = vec![0; SIZE];
    disk.file.read_exact_at(&mut content, 0).expect("the disk can be read");
    assert!(!virtio::has_secret(&content), "private bytes were written to the disk");
    assert_eq!(disk.file.metadata().expect("a file").len(), SIZE as u64);
    completed
}

fn disk() -> Disk {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("memory for a disk"));
    file.set_len(SIZE as u64).expect("memory for a disk");
    let kept = file.try_clone().expect("a descriptor");
    let host = virtio::host(vec![Arc::new(Block::new(file, false).expect("a disk"))]);
    Disk {
        host,
        device: Virtio::find(host, 1),
        file: kept,
    }
}
