//! A device whose configuration changes while its driver uses it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pagegate_core::devices::virtio::device::Device;
use pagegate_core::devices::virtio::queue::Queue;
use pagegate_core::devices::virtio::rng::Rng;
use pagegate_core::error::{Error, Failure};
use parking_lot::{Condvar, Mutex};

use crate::block::{DATA, Disk, IN, IO_ERROR, OK};
use crate::driver::{Host, Virtio, register};
use crate::test_devices::{Judge, disk};

const CONFIG_CHANGED: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(30);

fn generation(device: &Virtio<'_>) -> u64 {
    device.get(register::GENERATION, 1)
}

#[test]
fn a_disk_grows_and_shrinks() {
    let (device, file) = disk(64);
    let host = Host::new(Judge::deny(), vec![device]);
    let disk = Disk::new(&host);
    let sectors = || host.load(disk.device.device, 8);
    let first = generation(&disk.device);
    assert_eq!(disk.ask(IN, 64, &[(DATA, 512)]), (IO_ERROR, 1));
    assert_eq!(host.load(disk.device.isr, 1) & CONFIG_CHANGED, 0);
    for (size, now) in [(100, 100), (10, 10)] {
        file.set_len(size * 512 + 511).unwrap();
        let before = generation(&disk.device);
        host.machine.refresh_device("first").unwrap();
        assert_eq!(sectors(), now);
        assert_eq!(generation(&disk.device), before + 1);
        assert_eq!(host.load(disk.device.isr, 1) & CONFIG_CHANGED, CONFIG_CHANGED);
        assert_eq!(disk.ask(IN, now - 1, &[(DATA, 512)]), (OK, 513));
        assert_eq!(disk.ask(IN, now, &[(DATA, 512)]), (IO_ERROR, 1));
        host.load(disk.device.isr, 1);
    }
    host.machine.refresh_device("first").unwrap();
    assert_eq!(generation(&disk.device), first + 2, "nothing has changed");
    assert_eq!(host.load(disk.device.isr, 1) & CONFIG_CHANGED, 0);
}

#[test]
fn a_driver_that_is_not_ready_is_not_told() {
    let (device, file) = disk(64);
    let host = Host::new(Judge::deny(), vec![device]);
    let found = Virtio::find(&host, 1);
    file.set_len(512).unwrap();
    host.machine.refresh_device("first").unwrap();
    assert_eq!((host.load(found.isr, 1), host.load(found.device, 8)), (0, 1));
}

#[test]
fn what_cannot_be_read_again_stays() {
    let (device, file) = disk(64);
    let host = Host::new(Judge::deny(), vec![Arc::new(Rng), device]);
    let found = Virtio::find(&host, 2);
    let refresh = |name| host.machine.refresh_device(name);
    assert!(matches!(refresh("fourth"), Err(Error::Invalid(why)) if why.contains("fourth")));
    file.set_len(0).unwrap();
    assert!(matches!(refresh("second"), Err(Error::Device { device, .. }) if &*device == "second"));
    assert_eq!(host.load(found.device, 8), 64);
    refresh("first").unwrap();
    assert_eq!(generation(&found), 0);
}

/// A guest that reads the two halves of a field sees by the generation when they are of two states.
#[test]
fn a_change_between_two_reads_is_seen() {
    let (device, file) = disk(64);
    let host = Host::new(Judge::deny(), vec![device]);
    let found = Virtio::find(&host, 1);
    let half = |at| host.load(found.device + at, 4);
    let over = AtomicBool::new(false);
    let (mut unchanged, mut changed) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0_u64.. {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                // Both halves of the count of sectors change.
                file.set_len(512 * (1 + (turn % 2) * 0x1_0000_0001)).unwrap();
                host.machine.refresh_device("first").unwrap();
            }
        });
        for _ in 0..400 {
            let before = generation(&found);
            let (low, high) = (half(0), half(4));
            match generation(&found) == before {
                true => {
                    assert!(matches!((low, high), (1, 0) | (2, 1) | (64, 0)), "{low:#x} {high:#x}");
                    unchanged += 1;
                }
                false => changed += 1,
            }
        }
        over.store(true, Ordering::SeqCst);
    });
    assert!(unchanged + changed == 400 && changed > 0, "{unchanged} {changed}");
}

/// A device whose second configuration is given away only when a later one is there.
#[derive(Default)]
struct Overtaken {
    asked: AtomicU64,
    overtaken: (Mutex<bool>, Condvar),
}

impl Device for Overtaken {
    fn id(&self) -> u16 {
        42
    }

    fn queues(&self) -> &[u16] {
        &[16]
    }

    fn config(&self) -> Result<Vec<u8>, Failure> {
        let version = self.asked.fetch_add(1, Ordering::SeqCst);
        if version == 1 {
            let mut overtaken = self.overtaken.0.lock();
            self.overtaken.1.wait_while_for(&mut overtaken, |now| !*now, PATIENCE);
        }
        Ok(version.to_le_bytes().to_vec())
    }

    fn process(&self, _: &mut Vec<Queue>, _: usize) -> Result<(), Failure> {
        Ok(())
    }
}

#[test]
fn the_later_of_two_refreshes_counts() {
    let device = Arc::new(Overtaken::default());
    let host = Host::new(Judge::deny(), vec![device.clone()]);
    let found = Virtio::find(&host, 1);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| host.machine.refresh_device("first"));
        while device.asked.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        host.machine.refresh_device("first").unwrap();
        assert_eq!((host.load(found.device, 8), generation(&found)), (2, 1));
        *device.overtaken.0.lock() = true;
        device.overtaken.1.notify_all();
        first.join().unwrap().unwrap();
    });
    assert_eq!(
        (host.load(found.device, 8), generation(&found)),
        (2, 1),
        "the older one came last"
    );
    host.machine.refresh_device("first").unwrap();
    assert_eq!((host.load(found.device, 8), generation(&found)), (3, 2));
}
