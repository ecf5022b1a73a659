//! The common configuration: the order in which a driver has to do things, and what it must not do.

use std::sync::Arc;

use pagegate_core::devices::virtio::rng::Rng;

use crate::block::{DATA, Disk, IN, OK};
use crate::driver::{ACCESS_PLATFORM, Host, NO_VECTOR, USUAL, VERSION_1, Virtio, register, status};
use crate::rings::{AVAILABLE, DESCRIPTORS, USED, USUAL_PLACE};
use crate::test_devices::{Judge, disk};

fn host() -> Host {
    Host::new(Judge::deny(), vec![disk(8).0])
}

#[test]
fn features_are_those_offered_with_version_1() {
    let host = host();
    let device = Virtio::find(&host, 1);
    let offered = device.offered();
    assert_eq!(offered & USUAL, USUAL);
    device.set(register::DEVICE_SELECT, &2_u32.to_le_bytes());
    assert_eq!(device.get(register::DEVICE_FEATURES, 4), 0);
    let taken = |features| {
        device.reset();
        device.negotiate(features) & status::FEATURES_OK != 0
    };
    assert!(taken(offered) && taken(USUAL) && taken(VERSION_1));
    assert!(!taken(0) && !taken(ACCESS_PLATFORM) && !taken(offered & !VERSION_1));
    for bit in (0..64).filter(|bit| offered >> bit & 1 == 0) {
        assert!(!taken(USUAL | 1 << bit), "bit {bit}");
    }
    // A driver may correct itself, until it is taken at its word.
    device.reset();
    assert_eq!(device.negotiate(0) & status::FEATURES_OK, 0);
    assert_ne!(device.negotiate(USUAL) & status::FEATURES_OK, 0);
    device.accept(offered);
    device.set(register::DRIVER_SELECT, &0_u32.to_le_bytes());
    assert_eq!(device.get(register::DRIVER_FEATURES, 4), USUAL & 0xffff_ffff);
}

#[test]
fn the_status_goes_forward_only() {
    let host = host();
    let device = Virtio::find(&host, 1);
    device.set_status(status::DRIVER_OK);
    assert_eq!(device.status(), 0);
    device.negotiate(0);
    device.drive();
    assert_eq!(device.status(), status::ACKNOWLEDGE | status::DRIVER);
    device.accept(USUAL);
    // Both at once: whether the features are taken is not known to the driver yet.
    device.set_status(0xf);
    assert_eq!(device.status() & status::DRIVER_OK, 0);
    device.drive();
    assert_eq!(device.status(), 0xf);
    for written in [status::ACKNOWLEDGE, status::DRIVER_OK, status::NEEDS_RESET | 0x30] {
        device.set_status(written);
        assert_eq!(device.status(), 0xf, "{written:#x}");
    }
    device.set_status(status::FAILED);
    assert_eq!(device.status(), 0xf | status::FAILED);
    device.reset();
}

#[test]
fn a_queue_stays_as_it_was_enabled() {
    let host = host();
    let device = Virtio::find(&host, 1);
    device.negotiate(USUAL);
    device.select_queue(0);
    let size = || device.get(register::QUEUE_SIZE, 2);
    assert_eq!(size(), 256);
    for wrong in [0, 3, 100, 255, 257, 512, 0x8000, 0xffff_u16] {
        device.set(register::QUEUE_SIZE, &wrong.to_le_bytes());
        assert_eq!(size(), 256, "{wrong}");
    }
    device.set_up(0, 8, USUAL_PLACE);
    assert_eq!((size(), device.get(register::QUEUE_ENABLE, 2)), (8, 1));
    device.set_up(0, 16, [0; 3]);
    device.set(register::QUEUE_ENABLE, &0_u16.to_le_bytes());
    assert_eq!((size(), device.get(register::QUEUE_ENABLE, 2)), (8, 1));
    let places = [
        (register::QUEUE_DESCRIPTORS, DESCRIPTORS),
        (register::QUEUE_DRIVER, AVAILABLE),
        (register::QUEUE_DEVICE, USED),
    ];
    for (register, place) in places {
        assert_eq!((device.get(register, 4), device.get(register + 4, 4)), (place, 0));
        assert_eq!(device.get(register, 8), 0, "64-bit registers are accessed by halves");
    }
    device.reset();
    device.select_queue(0);
    assert_eq!((size(), device.get(register::QUEUE_ENABLE, 2)), (256, 0));
}

#[test]
fn a_queue_that_there_is_not_reads_as_nothing() {
    let host = host();
    let device = Virtio::find(&host, 1);
    device.negotiate(USUAL);
    for queue in [1, 63, 64, 0xffff] {
        device.set_up(queue, 8, USUAL_PLACE);
        assert_eq!(
            (
                device.get(register::QUEUE_SIZE, 2),
                device.get(register::QUEUE_ENABLE, 2)
            ),
            (0, 0)
        );
        assert_eq!(device.get(register::QUEUE_VECTOR, 2), u64::from(NO_VECTOR));
    }
    device.drive();
    // Doorbells of queues that there are not.
    for queue in 1..64 {
        host.store(device.doorbell(0) + 4 * queue, &[0; 2]);
    }
    assert_eq!(device.status(), 0xf);
}

#[test]
fn a_queue_cannot_be_enabled_after_the_driver_is_ready() {
    let host = host();
    let device = Virtio::find(&host, 1);
    device.negotiate(USUAL);
    device.drive();
    device.set_up(0, 8, USUAL_PLACE);
    assert_eq!(device.get(register::QUEUE_ENABLE, 2), 0);
    device.kick(0);
    assert_eq!((device.status(), host.events().len()), (0xf, 0));
}

#[test]
fn vectors_are_those_of_the_table() {
    let host = Host::new(Judge::deny(), vec![Arc::new(Rng)]);
    let device = Virtio::find(&host, 1);
    device.select_queue(0);
    for register in [register::CONFIG_VECTOR, register::QUEUE_VECTOR] {
        assert_eq!(device.get(register, 2), u64::from(NO_VECTOR));
        for (written, read) in [
            (0, 0),
            (1, 1),
            (2, NO_VECTOR),
            (1, 1),
            (0xfffe, NO_VECTOR),
            (1, 1),
            (NO_VECTOR, NO_VECTOR),
        ] {
            device.set(register, &u16::to_le_bytes(written));
            assert_eq!(device.get(register, 2), u64::from(read), "{written:#x}");
        }
    }
    assert_eq!(device.get(register::GENERATION, 1), 0);
}

#[test]
fn a_driver_that_did_not_say_it_is_one_gets_no_features() {
    let host = host();
    let device = Virtio::find(&host, 1);
    for known in [0, status::ACKNOWLEDGE, status::DRIVER] {
        device.reset();
        device.set_status(known);
        device.accept(USUAL);
        device.set_status(known | status::FEATURES_OK);
        assert_eq!(device.status(), known, "{known:#x}");
    }
}

#[test]
fn a_driver_that_gave_up_gets_no_answers() {
    let (device, _file) = disk(64);
    let host = Host::new(Judge::deny(), vec![device]);
    let disk = Disk::new(&host);
    assert_eq!(disk.ask(IN, 1, &[(DATA, 512)]), (OK, 513));
    disk.device.set_status(status::FAILED);
    assert_eq!(disk.device.status(), 0xf | status::FAILED);
    no_answer(&disk);
    disk.device.reset();
    assert_eq!(disk.device.status(), 0);
}

#[test]
fn a_device_that_is_no_bus_master_waits_until_it_is() {
    let (device, _file) = disk(64);
    let host = Host::new(Judge::deny(), vec![device]);
    let disk = Disk::new(&host);
    assert_eq!(disk.ask(IN, 1, &[(DATA, 512)]), (OK, 513));
    host.set_config(1, 4, &2_u16.to_le_bytes());
    no_answer(&disk);
    host.set_config(1, 4, &6_u16.to_le_bytes());
    disk.rings.wait(2);
    assert_eq!(host.read(DATA, 512), [2; 512]);
}

/// Offers a request for sector 2, and sees that nothing is written for a while.
fn no_answer(disk: &Disk<'_>) {
    disk.host.write(DATA, &[0xcc; 512]);
    disk.put(0, IN, 2, &[(DATA, 512)]);
    disk.rings.offer(0);
    disk.device.kick(0);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(disk.rings.completed(), 1);
    assert_eq!(disk.host.read(DATA, 512), [0xcc; 512]);
}
