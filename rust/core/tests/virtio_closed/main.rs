//! What is left of a machine with devices after it was closed: nothing. A process of its own, so that no other test opens
//! descriptors meanwhile.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs, dead_code)]

#[path = "../virtio/driver.rs"]
mod driver;
#[path = "../virtio/rings.rs"]
mod rings;

use std::fs::{read_dir, read_to_string};
use std::sync::Arc;

use pagegate_core::devices::virtio::block::Block;
use pagegate_core::devices::virtio::rng::Rng;
use pagegate_core::policy::simple::Allow;

use driver::{Host, Virtio};
use rings::Rings;

/// Open descriptors, threads, and mappings of guest memory.
fn held() -> (usize, usize, usize) {
    let count = |folder| read_dir(folder).unwrap().count();
    let maps = read_to_string("/proc/self/maps").unwrap();
    let mappings = maps.lines().filter(|line| line.contains("pagegate")).count();
    (count("/proc/self/fd"), count("/proc/self/task"), mappings)
}

#[test]
fn nothing_is_left() {
    let before = held();
    for _ in 0..3 {
        let file = std::fs::File::from(rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(4096).unwrap();
        let mut host = Host::new(
            Arc::new(Allow),
            vec![Arc::new(Block::new(file, false).unwrap()), Arc::new(Rng)],
        );
        let device = Virtio::find(&host, 2);
        let rings = Rings::start(&device, 8);
        rings.chain(0, &[(0x2_0000, 16, true)]);
        rings.offer(0);
        device.kick(0);
        rings.wait(1);
        let during = held();
        assert!(
            during.0 > before.0 + 10 && during.1 > before.1 + 3 && during.2 > 0,
            "{during:?}"
        );
        host.stop().0.unwrap();
        assert_eq!(held().1, before.1, "threads, between runs");
        host.machine.close().unwrap();
        drop(host);
    }
    assert_eq!(held(), before);
}
