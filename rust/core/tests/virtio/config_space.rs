//! The configuration space and BAR 0: where the registers are, and what an access of any width and place does.

use std::sync::Arc;

use pagegate_core::devices::pci::bus::WINDOW;
use pagegate_core::devices::virtio::device::Device;
use pagegate_core::devices::virtio::rng::Rng;

use crate::driver::{Host, Virtio, register, status};
use crate::test_devices::{Judge, disk};

const COMMAND: u64 = 0x04;
const BAR: u64 = 0x10;
/// Bytes of BAR 0.
const SIZE: u64 = 0x8000;

fn with(devices: Vec<Arc<dyn Device>>) -> Host {
    Host::new(Judge::deny(), devices)
}

#[test]
fn a_driver_finds_the_devices_and_nothing_else() {
    let host = with(vec![disk(8).0, Arc::new(Rng)]);
    assert_eq!(host.config(0, 8, 4) >> 16, 0x0600, "a host bridge");
    assert_eq!([1, 2].map(|device| host.config(device, 2, 2)), [0x1042, 0x1044]);
    for device in 3..32 {
        assert_eq!(host.config(device, 0, 4), 0xffff_ffff);
    }
    let device = Virtio::find(&host, 1);
    assert!(WINDOW.contains(&device.bar) && device.bar.is_multiple_of(SIZE));
    for place in [device.common, device.isr, device.device, device.doorbell(0)] {
        assert!((device.bar..device.bar + SIZE).contains(&place));
    }
    assert!(device.window != 0 && device.msix != 0);
    assert_eq!(device.host.load(device.device, 8), 8, "its sectors");
    assert_eq!(device.get(register::QUEUES, 2), 1);
    // The other functions, and other buses.
    for address in [1_u32 << 31 | 1 << 11 | 1 << 8, 1 << 31 | 1 << 16 | 1 << 11, 1 << 11] {
        host.port_out(0xcf8, &address.to_le_bytes());
        assert_eq!(host.port_in(0xcfc, 4), 0xffff_ffff, "{address:#x}");
    }
}

#[test]
fn bar_0_can_be_sized_and_moved() {
    let host = with(vec![disk(8).0]);
    let device = Virtio::find(&host, 1);
    host.set_config(1, BAR, &u32::MAX.to_le_bytes());
    assert_eq!(host.config(1, BAR, 4), u64::from(u32::MAX) - SIZE + 1);
    let moved = WINDOW.end - SIZE;
    host.set_config(1, BAR, &(moved as u32).to_le_bytes());
    assert_eq!(host.config(1, BAR, 4), moved);
    let queues = register::QUEUES;
    assert_eq!(host.load(device.common + queues, 2), 0xffff, "the old place");
    let common = device.common - device.bar + moved;
    assert_eq!(host.load(common + queues, 2), 1);
    // Neither without memory decoding.
    host.set_config(1, COMMAND, &0_u16.to_le_bytes());
    assert_eq!(host.load(common + queues, 2), 0xffff);
    assert!(host.fake.doorbells().is_empty());
    host.set_config(1, COMMAND, &2_u16.to_le_bytes());
    assert_eq!(host.load(common + queues, 2), 1);
    // The other BARs are none.
    for bar in 1..6 {
        host.set_config(1, BAR + 4 * bar, &u32::MAX.to_le_bytes());
        assert_eq!(host.config(1, BAR + 4 * bar, 4), 0);
    }
}

#[test]
fn doorbells_are_nowhere_but_in_the_window() {
    let host = with(vec![disk(8).0]);
    let device = Virtio::find(&host, 1);
    assert_eq!(host.fake.doorbells(), [device.doorbell(0)]);
    let outside = [
        0,
        0x1_0000,
        WINDOW.start - SIZE,
        WINDOW.end,
        0xfec0_0000,
        0xfee0_0000,
        0xffff_8000,
    ];
    for place in outside {
        host.set_config(1, BAR, &(place as u32).to_le_bytes());
        assert!(host.fake.doorbells().is_empty(), "with BAR 0 at {place:#x}");
    }
    host.set_config(1, BAR, &(WINDOW.start as u32).to_le_bytes());
    assert_eq!(host.fake.doorbells().len(), 1);
}

#[test]
fn a_bar_on_another_ones_hides_neither_for_good() {
    let host = with(vec![disk(8).0, Arc::new(Rng)]);
    let (first, second) = (Virtio::find(&host, 1), Virtio::find(&host, 2));
    host.set_config(2, BAR, &(first.bar as u32).to_le_bytes());
    // Either may answer, the host has to do so.
    assert_eq!(first.get(register::QUEUES, 2), 1);
    first.set_status(status::ACKNOWLEDGE);
    host.set_config(1, BAR, &(second.bar as u32).to_le_bytes());
    let swapped = Virtio::find(&host, 1);
    assert_eq!((swapped.bar, swapped.status()), (second.bar, status::ACKNOWLEDGE));
    assert_eq!(Virtio::find(&host, 2).bar, first.bar);
    let doorbells = host.fake.doorbells();
    assert!(doorbells.contains(&swapped.doorbell(0)), "{doorbells:x?}");
}

#[test]
fn the_window_shows_bar_0() {
    let host = with(vec![disk(8).0]);
    let device = Virtio::find(&host, 1);
    let window = |offset: u64, len: u32| {
        host.set_config(1, device.window + 8, &(offset as u32).to_le_bytes());
        host.set_config(1, device.window + 12, &len.to_le_bytes());
        device.window + 16
    };
    let common = device.common - device.bar;
    let data = window(common + register::STATUS, 1);
    host.set_config(1, data, &[status::ACKNOWLEDGE]);
    assert_eq!(device.status(), status::ACKNOWLEDGE);
    assert_eq!(host.config(1, data, 1), u64::from(status::ACKNOWLEDGE));
    let data = window(common + register::QUEUE_SIZE, 2);
    assert_eq!(host.config(1, data, 2), 256);
    // Accesses that the specification forbids: no access, and no end of the run.
    for (offset, len) in [
        (common + 1, 4),
        (SIZE, 4),
        (u64::from(u32::MAX), 1),
        (0, 0),
        (0, 3),
        (0, 8),
        (0, u32::MAX),
    ] {
        let data = window(offset, len);
        host.set_config(1, data, &0x55_u32.to_le_bytes());
        host.config(1, data, 4);
    }
    assert_eq!(device.status(), status::ACKNOWLEDGE);
}

#[test]
fn accesses_of_any_width_and_place_are_answered() {
    let host = with(vec![disk(8).0]);
    let device = Virtio::find(&host, 1);
    // Port 0xcf9 is reset control.
    for port in [0xcf8, 0xcfc, 0xcfd, 0xcfe, 0xcff] {
        for len in [1, 2, 4] {
            host.port_out(port, &vec![0xff; len]);
            host.port_in(port, len);
        }
    }
    // The whole of the address register is written, or nothing.
    host.port_out(0xcf8, &(1_u32 << 31 | 1 << 11).to_le_bytes());
    host.port_out(0xcf8, &[0xff; 2]);
    assert_eq!(host.port_in(0xcf8, 4), 1 << 31 | 1 << 11);
    assert_eq!(host.port_in(0xcfc, 2), 0x1af4);
    for at in (0..SIZE).step_by(0x7fd) {
        for len in 1..=8 {
            host.load(device.bar + at, len);
        }
    }
    // A register is read and written whole.
    device.set_status(status::ACKNOWLEDGE);
    device.set(register::STATUS, &[0; 2]);
    device.set(register::STATUS, &[0; 8]);
    assert_eq!(device.status(), status::ACKNOWLEDGE);
    assert_eq!(device.get(register::QUEUES, 4), 0);
    // Past the end of the registers, and of the window.
    assert_eq!(host.load(device.bar + SIZE - 4, 8), u64::MAX);
    assert_eq!(host.load(WINDOW.end - 4, 8), u64::MAX);
    host.store(device.bar + SIZE - 4, &[0; 8]);
}

#[test]
fn what_the_guest_must_not_change_stays() {
    let host = with(vec![disk(8).0]);
    let device = Virtio::find(&host, 1);
    let writable = [
        COMMAND,
        BAR,
        0x3c,
        device.window + 8,
        device.window + 12,
        device.window + 16,
        device.msix,
    ];
    let before: Vec<u64> = (0..64).map(|word| host.config(1, word * 4, 4)).collect();
    for word in (0..64).filter(|word| !writable.contains(&(word * 4))) {
        for value in [u32::MAX, 0] {
            host.set_config(1, word * 4, &value.to_le_bytes());
            assert_eq!(host.config(1, word * 4, 4), before[word as usize], "at {:#x}", word * 4);
        }
    }
    assert_eq!(host.config(0, 0, 4), 0x0008_1b36);
    host.set_config(0, 0, &[0; 4]);
    host.set_config(0, COMMAND, &[0xff; 4]);
    assert_eq!((host.config(0, 0, 4), host.config(0, COMMAND, 4)), (0x0008_1b36, 0));
}
