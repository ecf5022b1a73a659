//! The serial port, driven as Linux does.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use pagegate_core::devices::bus::IoHandler;
use pagegate_core::devices::console::Console;
use pagegate_core::devices::serial::Serial;
use pagegate_core::error::Error;
use pagegate_core::hypervisor::exit::Io;

use crate::port_io::{read, write};
use crate::serial_driver::*;

/// What no wait should take; only a test that fails waits so long.
const LONG: Duration = Duration::from_secs(20);

fn driver() -> Driver {
    Driver::new(Console::default())
}

/// `len` bytes in which a byte that is missing or moved shows.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8).collect()
}

/// As autoconfig() of Linux's 8250 driver finds a 16550A.
#[test]
fn linux_finds_a_16550a() {
    let driver = driver();
    driver.out(SCRATCH, 0xa5);
    assert_eq!(driver.inb(SCRATCH), 0xa5);
    driver.out(IER, 0);
    assert_eq!(driver.inb(IER), 0);
    driver.out(IER, 0x0f);
    assert_eq!(driver.inb(IER), 0x0f);
    driver.out(IER, 0);

    let mcr = driver.inb(MCR);
    driver.out(MCR, 0x1a);
    assert_eq!(driver.inb(MSR) & 0xf0, 0x90);
    driver.out(MCR, 0x1f);
    assert_eq!(driver.inb(MSR) & 0xf0, 0xf0);
    driver.out(MCR, mcr);
    assert_eq!(driver.inb(MSR) & 0xf0, 0xb0);

    driver.out(LCR, 0xbf);
    driver.out(FCR, 0);
    driver.out(LCR, 0);
    driver.out(FCR, 1);
    assert_eq!(driver.inb(IIR) >> 6, 3);
    assert_eq!(driver.inb(LSR), 0x60);
    assert_eq!(driver.output(), b"");
}

#[test]
fn the_divisor_is_no_data() {
    let driver = driver();
    driver.console.write(b"k");
    driver.out(LCR, 0x83);
    driver.out(DATA, 0x34);
    driver.out(IER, 0x12);
    assert_eq!((driver.inb(DATA), driver.inb(IER)), (0x34, 0x12));
    driver.out(LCR, 0x03);
    assert_eq!(driver.inb(IER), 0);
    assert_eq!(driver.poll(), Some(b'k'));
    assert_eq!(driver.output(), b"");
}

#[test]
fn loopback_is_separate_from_the_console() {
    let driver = driver();
    driver.out(IER, RECEIVE);
    driver.out(MCR, 0x18);
    for byte in 0..100 {
        driver.out(DATA, byte);
    }
    driver.console.write(b"from outside");
    assert!(driver.interrupts() > 0);
    let looped: Vec<u8> = std::iter::from_fn(|| driver.poll()).collect();
    assert_eq!(looped, Vec::from_iter(0..64), "what the FIFO holds");
    assert_eq!(driver.inb(LSR) & 1, 0);
    driver.interrupts();
    driver.out(MCR, 0x08);
    assert_eq!(driver.answer_interrupts(), b"from outside");
    assert_eq!(driver.output(), b"");
}

#[test]
fn the_empty_transmit_buffer_interrupts() {
    let driver = driver();
    driver.out(DATA, b'a');
    assert_eq!(driver.interrupts(), 0);
    driver.out(IER, TRANSMIT);
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(driver.inb(IIR), 0xc2);
    assert_eq!(driver.inb(IIR), 0xc1);
    // As Linux tests whether the UART has to be told again (UART_BUG_THRE).
    driver.out(IER, 0);
    driver.out(IER, TRANSMIT);
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(driver.inb(IIR), 0xc2);
    for _ in 0..3 {
        driver.out(DATA, b'b');
        assert_eq!(driver.interrupts(), 1);
        assert_eq!(driver.inb(IIR), 0xc2);
    }
    assert_eq!(driver.output(), b"abbb");
}

#[test]
fn received_data_interrupts() {
    let driver = driver();
    driver.console.write(b"a");
    assert_eq!(driver.interrupts(), 0);
    driver.out(IER, RECEIVE);
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(driver.inb(IIR), 0xc4);
    assert_eq!(driver.inb(LSR), 0x61);
    assert_eq!(driver.inb(DATA), b'a');
    assert_eq!((driver.inb(IIR), driver.inb(LSR)), (0xc1, 0x60));
    assert_eq!(driver.interrupts(), 0);
    driver.console.write(b"b");
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(driver.poll(), Some(b'b'));
    assert_eq!(driver.poll(), None);
}

/// Linux masks all interrupts while it prints.
#[test]
fn input_that_comes_while_interrupts_are_masked_interrupts_afterwards() {
    let driver = driver();
    driver.out(IER, 0);
    driver.console.write(b"ab");
    assert_eq!(driver.interrupts(), 0);
    driver.out(IER, RECEIVE);
    assert_eq!(driver.answer_interrupts(), b"ab");
}

/// The driver stops after 256 bytes, and learns of the rest only by interrupts.
#[test]
fn no_input_is_left_without_an_interrupt() {
    for len in [1, 63, 64, 65, 255, 256, 257, 300, 1000] {
        let driver = driver();
        driver.out(IER, RECEIVE | TRANSMIT);
        driver.console.write(&pattern(10));
        driver.console.write(&pattern(len));
        assert_eq!(driver.answer_interrupts(), [pattern(10), pattern(len)].concat());
    }
}

#[test]
fn much_input_arrives_complete_and_in_order() {
    let input = pattern(100_000);
    for with_interrupts in [false, true] {
        let driver = driver();
        driver.out(IER, if with_interrupts { RECEIVE } else { 0 });
        let writer = thread::spawn({
            let (console, input) = (driver.console.clone(), input.clone());
            move || console.write_all(&input, LONG)
        });
        let mut received = Vec::new();
        let start = Instant::now();
        while received.len() < input.len() && start.elapsed() < LONG {
            match with_interrupts {
                // Some at a time: on a busy host another thread has its turn first after each yield.
                false => received.extend((0..256).map_while(|_| driver.poll())),
                true => received.extend(driver.answer_interrupts()),
            }
            thread::yield_now();
        }
        assert!(
            received == input,
            "{} bytes, interrupts: {with_interrupts}",
            received.len()
        );
        assert_eq!(writer.join().unwrap(), input.len());
    }
}

#[test]
fn string_io_moves_every_byte() {
    let driver = driver();
    let output = pattern(4096);
    write(&*driver.serial, COM1, 1, &output);
    assert_eq!(driver.output(), output);
    driver.console.write(&output);
    assert_eq!(read(&*driver.serial, COM1, 1, 4096), output);
    assert_eq!(driver.poll(), None);
}

#[test]
fn bytes_of_a_large_access_go_to_consecutive_registers() {
    let driver = driver();
    write(
        &*driver.serial,
        COM1,
        4,
        &[b'x', TRANSMIT, 0, 0x03, b'y', RECEIVE, 0, 0x03],
    );
    assert_eq!(driver.output(), b"xy");
    assert_eq!((driver.inb(IER), driver.inb(LCR)), (RECEIVE, 0x03));
    driver.inb(IIR);
    driver.console.write(b"k");
    assert_eq!(read(&*driver.serial, COM1, 4, 4), [b'k', RECEIVE, 0xc1, 0x03]);
    write(&*driver.serial, COM1 + 6, 2, &[0, 0x77]);
    assert_eq!(driver.inb(SCRATCH), 0x77);
    // Past the last register there is nothing.
    assert_eq!(read(&*driver.serial, COM1 + 6, 4, 4), [0xb0, 0x77, 0xff, 0xff]);
    write(&*driver.serial, COM1 + 7, 4, &[0x11, b'z', b'z', b'z']);
    assert_eq!((driver.inb(SCRATCH), driver.output()), (0x11, b"xy".to_vec()));
}

#[test]
fn input_from_before_the_port_is_received() {
    let console = Console::default();
    console.write(b"early");
    let driver = Driver::new(console);
    let received: Vec<u8> = std::iter::from_fn(|| driver.poll()).collect();
    assert_eq!(received, b"early");
}

#[test]
fn a_console_has_one_port() {
    let driver = driver();
    let second = Serial::new(driver.console.clone(), EventFd::new(EFD_NONBLOCK).unwrap());
    assert!(matches!(second.err(), Some(Error::Invalid(_))));
}

#[test]
fn a_port_ends_with_its_machine() {
    let driver = driver();
    let weak = Arc::downgrade(&driver.serial);
    let console = driver.console.clone();
    drop(driver);
    assert!(weak.upgrade().is_none());
    assert_eq!(console.write(b"nobody reads it"), 15);
}

#[test]
fn a_port_of_others_is_refused() {
    let io = Io {
        port: 0x3f7,
        write: true,
        size: 1,
        count: 1,
        data: 0,
    };
    assert!(driver().serial.io(0, &io, &mut [0]).is_err());
}
