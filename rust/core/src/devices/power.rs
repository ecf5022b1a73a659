//! The ports by which a guest ends its machine: power off and reboot.

use std::sync::atomic::{AtomicU8, Ordering};

use super::bus::IoHandler;
use crate::error::Failure;
use crate::hypervisor::exit::Io;

/// SLP_EN of the sleep control register: enter the sleep state that SLP_TYP names.
const SLEEP_ENABLE: u8 = 1 << 5;
/// SLP_TYP, three bits.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111 << SLEEP_TYPE_SHIFT;
/// The keyboard controller's command that pulses the reset line.
const PULSE_RESET: u8 = 0xfe;
/// RST_CPU of the reset control register.
const RESET_CPU: u8 = 1 << 2;
/// The keyboard controller's status: all ones but for its input buffer, which is not full.
///
/// There is no such controller. Linux's driver reads bytes while the status says that there is one (bit 0), and gives
/// up after 16, before it sends any command. To reboot, Linux first waits until the input buffer is empty (bit 1); with
/// 0xff it would read the status 65,536 times.
const NO_KEYBOARD_CONTROLLER: u8 = 0xfd;

/// Ends the machine when the guest asks for it. Register it on all of [`Power::PORTS`].
///
/// | port | | a write that ends the machine |
/// |---|---|---|
/// | 0x64 | command of the keyboard controller | 0xfe: "reboot" |
/// | 0x600 | ACPI sleep control | SLP_EN, and SLP_TYP 5: "poweroff" |
/// | 0x602 | ACPI reset register | 1: "reboot" |
/// | 0xcf9 | reset control | bit 2: "reboot" |
///
/// Any other write changes nothing, but that reset control reads back. The sleep registers (control at 0x600, status at
/// 0x601) and the reset register read 0: there is no sleep to wake from.
pub struct Power {
    end: Box<dyn Fn(&'static str) + Send + Sync>,
    reset_control: AtomicU8,
}

impl Power {
    /// Data port of the keyboard controller.
    pub const KEYBOARD_DATA: u16 = 0x60;
    /// Command and status port of the keyboard controller.
    pub const KEYBOARD_COMMAND: u16 = 0x64;
    /// ACPI's sleep control register, for the FADT.
    pub const SLEEP_CONTROL: u16 = 0x600;
    /// ACPI's sleep status register, for the FADT.
    pub const SLEEP_STATUS: u16 = 0x601;
    /// ACPI's reset register, for the FADT.
    pub const RESET: u16 = 0x602;
    /// What a write to [`Power::RESET`] has to be, for the FADT.
    pub const RESET_VALUE: u8 = 1;
    /// Reset control of the chipset.
    pub const RESET_CONTROL: u16 = 0xcf9;
    /// SLP_TYP of the state "off" (S5), for the DSDT.
    pub const SLEEP_TYPE_OFF: u8 = 5;
    /// All ports.
    pub const PORTS: [u16; 6] = [
        Self::KEYBOARD_DATA,
        Self::KEYBOARD_COMMAND,
        Self::SLEEP_CONTROL,
        Self::SLEEP_STATUS,
        Self::RESET,
        Self::RESET_CONTROL,
    ];

    /// `end` is called with the reason, "poweroff" or "reboot", on the vCPU thread that asked, and may be called again.
    /// It has to stop the run.
    pub fn new(end: Box<dyn Fn(&'static str) + Send + Sync>) -> Self {
        Self {
            end,
            reset_control: AtomicU8::new(0),
        }
    }

    /// What a byte reads as. Ports of others read as ones.
    fn read(&self, port: u32) -> u8 {
        match u16::try_from(port) {
            Ok(Self::KEYBOARD_COMMAND) => NO_KEYBOARD_CONTROLLER,
            Ok(Self::SLEEP_CONTROL | Self::SLEEP_STATUS | Self::RESET) => 0,
            Ok(Self::RESET_CONTROL) => self.reset_control.load(Ordering::Relaxed),
            _ => 0xff,
        }
    }

    /// Writes a byte. Returns why the machine is to end, if it is.
    fn write(&self, port: u32, value: u8) -> Option<&'static str> {
        match u16::try_from(port) {
            Ok(Self::KEYBOARD_COMMAND) => (value == PULSE_RESET).then_some("reboot"),
            Ok(Self::SLEEP_CONTROL) => {
                let off = SLEEP_ENABLE | Self::SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT;
                (value & (SLEEP_ENABLE | SLEEP_TYPE_MASK) == off).then_some("poweroff")
            }
            Ok(Self::RESET) => (value == Self::RESET_VALUE).then_some("reboot"),
            Ok(Self::RESET_CONTROL) => {
                // The reset clears the bit, so it never reads as set.
                self.reset_control.store(value & !RESET_CPU, Ordering::Relaxed);
                (value & RESET_CPU != 0).then_some("reboot")
            }
            _ => None,
        }
    }
}

impl IoHandler for Power {
    /// Bytes of an access of 2 or 4 go to consecutive ports. Nothing is written after a byte that ends the machine.
    fn io(&self, _vcpu: u32, io: &Io, data: &mut [u8]) -> Result<(), Failure> {
        let ports = || u32::from(io.port)..;
        for access in data.chunks_mut(usize::from(io.size.max(1))) {
            if io.write {
                if let Some(reason) = ports().zip(access).find_map(|(port, byte)| self.write(port, *byte)) {
                    (self.end)(reason);
                    break;
                }
            } else {
                for (port, byte) in ports().zip(access) {
                    *byte = self.read(port);
                }
            }
        }
        Ok(())
    }
}
