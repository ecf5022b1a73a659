//! The serial port COM1: a 16550A at ports 0x3f8 to 0x3ff, IRQ 4, with a console at its other end.

use std::convert::Infallible;
use std::ops::RangeInclusive;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState};
use vmm_sys_util::eventfd::EventFd;

use super::bus::IoHandler;
use super::console::Console;
use crate::error::{Error, Failure};
use crate::hypervisor::exit::Io;

/// The receive buffer, if it is read and DLAB is clear.
const DATA: u8 = 0;
/// Modem control.
const MCR: u8 = 4;
/// Its bit for loopback, in which nothing is received from outside.
const MCR_LOOPBACK: u8 = 1 << 4;
/// Line status.
const LSR: u8 = 5;
/// Its bit for a received byte that was not read yet.
const LSR_DATA_READY: u8 = 1 << 0;

/// COM1. Register it on all of [`Serial::PORTS`].
///
/// Its lock is taken before the console's. As on a real port, a driver that resets the port when it is opened discards
/// a byte or two of what was received before.
pub struct Serial {
    port: Mutex<Port>,
    console: Arc<Console>,
}

/// The registers and the FIFO, as a snapshot has them.
#[derive(Deserialize, Serialize)]
pub(crate) struct SavedSerial {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
}

/// The registers, and the bytes that the guest wrote with the present exit.
type Port = Uart<Interrupt, NoEvents, Vec<u8>>;

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        // It fails only if the eventfd's counter is full, and then the interrupt is pending already.
        let _ = self.0.write(1);
        Ok(())
    }
}

impl Serial {
    /// Its ports, one for each register.
    pub const PORTS: RangeInclusive<u16> = 0x3f8..=0x3ff;
    /// Its interrupt line, edge-triggered.
    pub const IRQ: u32 = 4;

    /// A serial port at a console, which calls [`Serial::feed`] from now on. `interrupt` is the irqfd of
    /// [`Serial::IRQ`], an eventfd with EFD_NONBLOCK.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the console has a device already.
    pub fn new(console: Arc<Console>, interrupt: EventFd) -> Result<Arc<Self>, Error> {
        let serial = Arc::new(Self {
            port: Mutex::new(Uart::new(Interrupt(interrupt), Vec::new())),
            console,
        });
        let weak = Arc::downgrade(&serial);
        let feed = move || {
            if let Some(serial) = Weak::upgrade(&weak) {
                serial.feed();
            }
        };
        serial.console.on_input(Box::new(feed))?;
        serial.feed();
        Ok(serial)
    }

    /// Has the guest receive the console's input, if the port has room. The rest follows as the guest reads.
    pub fn feed(&self) {
        self.receive(&mut self.port.lock());
    }

    /// Its state, between runs.
    pub(crate) fn save(&self) -> SavedSerial {
        let state = self.port.lock().state();
        SavedSerial {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// Takes a state that was saved. An interrupt that was pending is raised again.
    ///
    /// # Errors
    /// `Invalid` for more received bytes than the FIFO holds; `Host` without descriptors.
    pub(crate) fn restore(&self, saved: SavedSerial) -> Result<(), Error> {
        let [baud_divisor_low, baud_divisor_high] = saved.divisor;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.received,
        };
        let mut port = self.port.lock();
        let interrupt = port.interrupt_evt().0.try_clone().map_err(|error| Error::Host {
            what: "give the serial port its interrupt",
            errno: error.into(),
        })?;
        let restored = Uart::from_state(&state, Interrupt(interrupt), NoEvents, Vec::new());
        *port = restored.map_err(|_| Error::Invalid("the serial port's FIFO is too long".to_owned()))?;
        Ok(())
    }

    /// Receives the next byte of input if there is none that the guest has not read yet.
    ///
    /// One at a time, though vm-superio's FIFO holds 64: each byte read clears the interrupt's cause there, also if
    /// there are more. A driver that stops reading in between (Linux's, after 256 bytes) would not hear of the rest
    /// until the next input. Like this there is an interrupt for each byte.
    fn receive(&self, port: &mut Port) {
        // Reading these two changes nothing.
        let ready = port.read(LSR) & LSR_DATA_READY == 0 && port.read(MCR) & MCR_LOOPBACK == 0;
        let mut byte = [0];
        if ready && self.console.take_input(&mut byte) > 0 {
            // It cannot fail: the FIFO is empty, and an interrupt is never refused.
            let _ = port.enqueue_raw_bytes(&byte);
        }
    }

    /// Accesses one register. Those past the last one read as ones, and a write to them is ignored, as on a port
    /// without a handler.
    fn access(&self, port: &mut Port, register: u32, write: bool, byte: &mut u8) -> Result<(), Failure> {
        let register = u8::try_from(register).ok().filter(|register| *register < 8);
        match register {
            Some(register) if write => {
                port.write(register, *byte)?;
                if register == MCR {
                    self.receive(port);
                }
            }
            Some(register) => {
                *byte = port.read(register);
                if register == DATA {
                    self.receive(port);
                }
            }
            None if !write => *byte = 0xff,
            None => {}
        }
        Ok(())
    }
}

impl IoHandler for Serial {
    /// Bytes of an access of 2 or 4 go to consecutive registers.
    fn io(&self, _vcpu: u32, io: &Io, data: &mut [u8]) -> Result<(), Failure> {
        let Some(first) = io.port.checked_sub(*Self::PORTS.start()) else {
            return Err(format!("port {:#x} is not one of the serial port", io.port).into());
        };
        let mut port = self.port.lock();
        for access in data.chunks_mut(usize::from(io.size.max(1))) {
            for (register, byte) in (u32::from(first)..).zip(access) {
                self.access(&mut port, register, io.write, byte)?;
            }
        }
        // All that the guest wrote with this exit, at once. Under the lock, so that it stays in order.
        if !port.writer().is_empty() {
            self.console.append_output(port.writer());
            port.writer_mut().clear();
        }
        Ok(())
    }
}
