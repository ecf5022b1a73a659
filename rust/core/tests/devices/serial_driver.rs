//! A driver of the serial port, as naive as it can be, that works like Linux's 8250.

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use pagegate_core::devices::console::Console;
use pagegate_core::devices::serial::Serial;

use crate::port_io::{read, write};

pub const DATA: u16 = 0;
pub const IER: u16 = 1;
/// Read only; written, it is FCR.
pub const IIR: u16 = 2;
pub const FCR: u16 = 2;
pub const LCR: u16 = 3;
pub const MCR: u16 = 4;
pub const LSR: u16 = 5;
pub const MSR: u16 = 6;
pub const SCRATCH: u16 = 7;

/// IER: received data available.
pub const RECEIVE: u8 = 1;
/// IER: the transmit buffer is empty.
pub const TRANSMIT: u8 = 2;

pub const COM1: u16 = 0x3f8;

/// How many bytes Linux reads for one interrupt at most.
const BYTES_AT_ONCE: usize = 256;

pub struct Driver {
    pub console: Arc<Console>,
    pub serial: Arc<Serial>,
    interrupt: EventFd,
}

impl Driver {
    pub fn new(console: Console) -> Self {
        let console = Arc::new(console);
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let serial = Serial::new(console.clone(), interrupt.try_clone().unwrap()).unwrap();
        Self {
            console,
            serial,
            interrupt,
        }
    }

    pub fn out(&self, register: u16, value: u8) {
        write(&*self.serial, COM1 + register, 1, &[value]);
    }

    pub fn inb(&self, register: u16) -> u8 {
        read(&*self.serial, COM1 + register, 1, 1)[0]
    }

    /// Interrupts since the last call.
    pub fn interrupts(&self) -> u64 {
        self.interrupt.read().unwrap_or(0)
    }

    /// The byte that was received, if there is one.
    pub fn poll(&self) -> Option<u8> {
        (self.inb(LSR) & 1 != 0).then(|| self.inb(DATA))
    }

    /// Answers interrupts for as long as there are any. Returns what was received.
    pub fn answer_interrupts(&self) -> Vec<u8> {
        let mut received = Vec::new();
        while self.interrupts() > 0 {
            while self.inb(IIR) & 1 == 0 {
                received.extend((0..BYTES_AT_ONCE).map_while(|_| self.poll()));
            }
        }
        received
    }

    /// All that is left of the guest's output.
    pub fn output(&self) -> Vec<u8> {
        self.console.tail(usize::MAX)
    }
}
