//! The ports by which a guest ends its machine.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use pagegate_core::devices::power::Power;

use crate::port_io::{read, write};

fn power() -> (Arc<Power>, Receiver<&'static str>) {
    let (sender, reasons) = channel();
    let end = move |reason| sender.send(reason).unwrap();
    (Arc::new(Power::new(Box::new(end))), reasons)
}

/// What one OUT ends the machine with.
fn ends_with(port: u16, size: u8, bytes: &[u8]) -> Vec<&'static str> {
    let (power, reasons) = power();
    write(&*power, port, size, bytes);
    reasons.try_iter().collect()
}

#[test]
fn what_ends_a_machine() {
    for port in Power::PORTS {
        for value in 0..=u8::MAX {
            let expected = match port {
                0x64 if value == 0xfe => Some("reboot"),
                // Bits 0, 1, 6 and 7 are reserved.
                0x600 if value & 0x3c == 0x34 => Some("poweroff"),
                0x602 if value == 1 => Some("reboot"),
                0xcf9 if value & 4 != 0 => Some("reboot"),
                _ => None,
            };
            let reasons = ends_with(port, 1, &[value]);
            assert_eq!(reasons, Vec::from_iter(expected), "{value:#x} to port {port:#x}");
        }
    }
}

#[test]
fn bytes_of_a_large_access_go_to_consecutive_ports() {
    assert_eq!(ends_with(0x600, 4, &[0, 0, 1, 0]), ["reboot"]);
    assert_eq!(ends_with(0x600, 2, &[0, 0x34]), [""; 0]);
    assert_eq!(ends_with(0xffff, 4, &[0, 0xfe, 0xfe, 1]), [""; 0]);
    let (power, _) = power();
    assert_eq!(read(&*power, 0x600, 4, 4), [0, 0, 0, 0xff]);
    assert_eq!(read(&*power, 0x60, 4, 8), [0xff; 8]);
}

#[test]
fn string_output_ends_a_machine_once() {
    assert_eq!(ends_with(0x64, 1, &[0xfe; 4096]), ["reboot"]);
    assert_eq!(ends_with(0x600, 1, &[0x3c, 0, 0x34, 0x34]), ["poweroff"]);
}

/// As acpi_hw_extended_sleep does.
#[test]
fn linux_powers_off() {
    let (power, reasons) = power();
    write(&*power, Power::SLEEP_STATUS, 1, &[0x80]);
    assert_eq!(read(&*power, Power::SLEEP_STATUS, 1, 1), [0]);
    write(&*power, Power::SLEEP_CONTROL, 1, &[Power::SLEEP_TYPE_OFF << 2 | 1 << 5]);
    assert_eq!(reasons.try_iter().collect::<Vec<_>>(), ["poweroff"]);
}

/// As the i8042 driver of Linux probes: it flushes the controller, and finds none if that does not end.
#[test]
fn linux_finds_no_keyboard_controller() {
    let (power, reasons) = power();
    let has_byte = |_: &i32| read(&*power, 0x64, 1, 1)[0] & 1 != 0;
    let flushed = (0..17).take_while(has_byte).inspect(|_| _ = read(&*power, 0x60, 1, 1));
    assert_eq!(flushed.count(), 17);
    assert_eq!(reasons.try_iter().count(), 0);
}

/// As Linux reboots with `reboot=kbd`, the default without ACPI: it waits for the input buffer to be empty.
#[test]
fn linux_reboots_by_the_keyboard_controller_without_waiting() {
    let (power, reasons) = power();
    assert_eq!(read(&*power, 0x64, 1, 1)[0] & 2, 0);
    write(&*power, 0x64, 1, &[0xfe]);
    assert_eq!(reasons.try_iter().collect::<Vec<_>>(), ["reboot"]);
}

/// As Linux reboots with `reboot=pci`.
#[test]
fn linux_reboots_by_the_reset_control() {
    let (power, reasons) = power();
    let before = read(&*power, 0xcf9, 1, 1)[0] & !0x0e;
    write(&*power, 0xcf9, 1, &[before | 2]);
    assert_eq!(read(&*power, 0xcf9, 1, 1), [2]);
    assert_eq!(reasons.try_iter().count(), 0);
    write(&*power, 0xcf9, 1, &[before | 0x0e]);
    assert_eq!(reasons.try_iter().collect::<Vec<_>>(), ["reboot"]);
    assert_eq!(read(&*power, 0xcf9, 1, 1), [0x0a]);
}
