//! The virtio console.

use std::sync::Arc;
use std::time::Duration;

use pagegate_core::devices::console::{Console, INPUT_LIMIT};
use pagegate_core::devices::virtio::console::VirtioConsole;
use pagegate_core::memory::address::State;

use crate::requests::{A_WHILE, Driver, PATIENCE, Part};

const INPUT: usize = 0;
const OUTPUT: usize = 1;

fn console() -> (Arc<Console>, Driver) {
    let console = Arc::new(Console::default());
    let device = VirtioConsole::new(console.clone()).unwrap();
    (console, Driver::new(Arc::new(device)))
}

#[test]
fn output_reaches_the_console_in_order() {
    let (console, mut driver) = console();
    let mut reader = console.reader();
    driver.add(OUTPUT, &[Part::Read(b"one "), Part::Read(b"two "), Part::Read(b"")]);
    driver.send(OUTPUT, &[Part::Read(b"three")]);
    driver.wait(OUTPUT);
    driver.wait(OUTPUT);
    assert_eq!(reader.read(100, PATIENCE).bytes, b"one two three");
    driver.stop();
}

#[test]
fn input_waits_for_buffers_and_is_written_in_order() {
    let (console, mut driver) = console();
    console.write(b"hello, guest");
    std::thread::sleep(A_WHILE);
    assert_eq!(driver.completed(INPUT), None);
    let first = driver.add(INPUT, &[Part::Write(2), Part::Write(3)]);
    let second = driver.send(INPUT, &[Part::Write(100)]);
    assert_eq!(driver.wait(INPUT), (first.head, 5));
    assert_eq!(
        [driver.read(first.gpas[0], 2), driver.read(first.gpas[1], 3)].concat(),
        b"hello"
    );
    assert_eq!(driver.wait(INPUT), (second.head, 7));
    assert_eq!(driver.read(second.gpas[0], 8), b", guest\0");

    // A buffer that waits for input.
    let third = driver.send(INPUT, &[Part::Write(100)]);
    std::thread::sleep(A_WHILE);
    assert_eq!(driver.completed(INPUT), None);
    console.write(b"more");
    assert_eq!(driver.wait(INPUT), (third.head, 4));
    assert_eq!(driver.read(third.gpas[0], 4), b"more");
    driver.stop();
}

#[test]
fn more_input_than_the_queue_has_room_for() {
    let (console, mut driver) = console();
    let bytes: Vec<u8> = (0..INPUT_LIMIT).map(|i| (i / 7) as u8).collect();
    assert_eq!(console.write(&bytes), INPUT_LIMIT);
    let mut received = Vec::new();
    for _ in 0..2 {
        let sent: Vec<_> = (0..64).map(|_| driver.add(INPUT, &[Part::Write(512)])).collect();
        driver.kick();
        for buffer in sent {
            assert_eq!(driver.wait(INPUT), (buffer.head, 512));
            received.extend(driver.read(buffer.gpas[0], 512));
        }
    }
    assert_eq!(received, bytes);
    driver.stop();
}

#[test]
fn input_for_a_private_page_goes_into_the_next_buffer() {
    let (console, mut driver) = console();
    let private = driver.add(INPUT, &[Part::Write(64)]);
    driver.host.convert(private.gpas[0], State::Private);
    driver.skip_to_next_page();
    let shared = driver.send(INPUT, &[Part::Write(64)]);
    console.write(b"kept");
    assert_eq!(driver.wait(INPUT), (private.head, 0));
    assert_eq!(driver.wait(INPUT), (shared.head, 4));
    assert_eq!(driver.read(shared.gpas[0], 4), b"kept");
    driver.stop();
}

#[test]
fn output_from_a_private_page_is_not_read() {
    let (console, mut driver) = console();
    let mut reader = console.reader();
    let private = driver.add(OUTPUT, &[Part::Read(b"secret")]);
    driver.host.convert(private.gpas[0], State::Private);
    driver.skip_to_next_page();
    driver.send(OUTPUT, &[Part::Read(b"public")]);
    assert_eq!(driver.wait(OUTPUT), (private.head, 0));
    driver.wait(OUTPUT);
    assert_eq!(reader.read(100, PATIENCE).bytes, b"public");
    assert_eq!(driver.host.machine.events().total(), 1);
    driver.stop();
}

#[test]
fn a_request_takes_64_kib_at_most() {
    let (console, mut driver) = console();
    let bytes = vec![b'x'; 80 << 10];
    driver.put(OUTPUT, &bytes);
    assert_eq!(console.total(), 64 << 10);
    driver.stop();
}

#[test]
fn requests_the_wrong_way_round_change_nothing() {
    let (console, mut driver) = console();
    console.write(b"input");
    let wrong = driver.add(INPUT, &[Part::Read(b"not for writing")]);
    let right = driver.send(INPUT, &[Part::Write(64)]);
    assert_eq!(driver.wait(INPUT), (wrong.head, 0));
    assert_eq!(driver.wait(INPUT), (right.head, 5));
    let sent = driver.send(OUTPUT, &[Part::Write(64)]);
    assert_eq!(driver.wait(OUTPUT), (sent.head, 0));
    assert_eq!(console.total(), 0);
    driver.stop();
}

#[test]
fn input_from_between_runs_and_after_a_reset() {
    let (console, mut driver) = console();
    let sent = driver.send(INPUT, &[Part::Write(64)]);
    driver.put(OUTPUT, b"ready");
    driver.stop();
    console.write(b"between");
    std::thread::sleep(A_WHILE);
    assert_eq!(driver.completed(INPUT), None);
    driver.run();
    assert_eq!(driver.wait(INPUT), (sent.head, 7));
    driver.send(INPUT, &[Part::Write(64)]);
    driver.reset();
    std::thread::sleep(A_WHILE);
    console.write(b"late");
    std::thread::sleep(A_WHILE);
    assert_eq!(driver.completed(INPUT), None);
    driver.stop();
    assert_eq!(console.take_input(&mut [0; 64]), 4);
}

#[test]
fn its_end_ends_the_console() {
    let (console, mut driver) = console();
    driver.put(OUTPUT, b"last words");
    driver.stop();
    let mut reader = console.reader();
    drop(driver);
    let chunk = reader.read(100, Duration::ZERO);
    assert_eq!((&chunk.bytes[..], chunk.ended), (&b"last words"[..], true));
    assert_eq!(console.write(b"x"), 0);
}

#[test]
fn a_console_has_one_device() {
    let console = Arc::new(Console::default());
    let _device = VirtioConsole::new(console.clone()).unwrap();
    assert!(VirtioConsole::new(console).is_err());
}
