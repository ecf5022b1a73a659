//! The console by itself: what readers get, what is lost, who waits for what.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use pagegate_core::devices::console::{Chunk, Console, INPUT_LIMIT};
use pagegate_core::error::Error;

const AT_ONCE: Duration = Duration::ZERO;
const SHORT: Duration = Duration::from_millis(30);
/// What no wait should take; only a test that fails waits so long.
const LONG: Duration = Duration::from_secs(20);

fn console(output_limit: usize) -> Arc<Console> {
    Arc::new(Console::new(output_limit))
}

fn chunk(bytes: &[u8], lost: u64) -> Chunk {
    Chunk {
        bytes: bytes.to_vec(),
        lost,
        ended: false,
    }
}

fn ended(bytes: &[u8]) -> Chunk {
    Chunk {
        ended: true,
        ..chunk(bytes, 0)
    }
}

#[test]
fn readers_do_not_affect_one_another() {
    let console = console(100);
    let mut early = console.reader();
    console.append_output(b"hello ");
    assert_eq!(early.read(3, LONG), chunk(b"hel", 0));
    let mut late = console.reader();
    console.append_output(b"world");
    assert_eq!(late.read(100, LONG), chunk(b"hello world", 0));
    assert_eq!(early.read(100, LONG), chunk(b"lo world", 0));
    assert_eq!(early.read(100, AT_ONCE), chunk(b"", 0));
    assert_eq!(console.total(), 11);
    assert_eq!(console.tail(5), b"world");
    assert_eq!(console.tail(usize::MAX), b"hello world");
}

#[test]
fn the_oldest_bytes_are_lost_and_counted() {
    let console = console(4);
    let mut slow = console.reader();
    console.append_output(b"abc");
    assert_eq!(slow.read(1, LONG), chunk(b"a", 0));
    console.append_output(b"defghi");
    assert_eq!(slow.read(2, LONG), chunk(b"fg", 4));
    assert_eq!(slow.read(9, LONG), chunk(b"hi", 0));
    console.append_output(&[b'x'; 1000]);
    assert_eq!(console.reader().read(9, LONG), chunk(b"xxxx", 0));
    assert_eq!(slow.read(9, LONG), chunk(b"xxxx", 996));
    assert_eq!(console.total(), 1009);
}

#[test]
fn without_room_output_is_only_counted() {
    let console = console(0);
    let mut reader = console.reader();
    console.append_output(b"abc");
    assert_eq!(reader.read(9, LONG), chunk(b"", 3));
    assert_eq!(reader.read(9, AT_ONCE), chunk(b"", 0));
    assert_eq!((console.total(), console.tail(9)), (3, vec![]));
}

#[test]
fn a_read_waits_no_longer_than_it_may() {
    let mut reader = console(100).reader();
    let start = Instant::now();
    assert_eq!(reader.read(9, SHORT), chunk(b"", 0));
    assert!((SHORT..LONG).contains(&start.elapsed()));
    assert_eq!(reader.read(0, Duration::MAX), chunk(b"", 0));
}

#[test]
fn output_wakes_all_readers() {
    let console = console(100);
    let (sender, chunks) = channel();
    for timeout in [LONG, Duration::MAX] {
        let (mut reader, sender) = (console.reader(), sender.clone());
        thread::spawn(move || sender.send(reader.read(9, timeout)));
    }
    thread::sleep(SHORT);
    console.append_output(b"x");
    for _ in 0..2 {
        assert_eq!(chunks.recv_timeout(LONG / 2).unwrap(), chunk(b"x", 0));
    }
}

#[test]
fn a_closed_console_is_read_to_its_end() {
    let console = console(100);
    let mut reader = console.reader();
    let mut waiting = console.reader();
    let waiting = thread::spawn(move || waiting.read(9, LONG));
    thread::sleep(SHORT);
    let start = Instant::now();
    console.close();
    assert_eq!(waiting.join().unwrap(), ended(b""));
    assert!(start.elapsed() < LONG / 2);
    assert_eq!(reader.read(9, LONG), ended(b""));

    let console = Arc::new(Console::default());
    let mut reader = console.reader();
    console.append_output(b"abc");
    console.close();
    console.append_output(b"def");
    assert_eq!(reader.read(2, LONG), chunk(b"ab", 0));
    assert_eq!(reader.read(2, LONG), ended(b"c"));
    assert_eq!(reader.read(2, LONG), ended(b""));
    assert_eq!((console.write(b"x"), console.write_all(b"x", LONG)), (0, 0));
}

#[test]
fn input_is_bounded() {
    let console = console(0);
    assert_eq!(console.write(b"abc"), 3);
    assert_eq!(console.write(&vec![b'x'; 2 * INPUT_LIMIT]), INPUT_LIMIT - 3);
    assert_eq!(console.write(b"d"), 0);
    let mut buffer = [0; 4];
    assert_eq!(console.take_input(&mut buffer), 4);
    assert_eq!(&buffer, b"abcx");
    assert_eq!(console.write(b"efghi"), 4);
    let start = Instant::now();
    assert_eq!(console.write_all(b"j", SHORT), 0);
    assert!((SHORT..LONG).contains(&start.elapsed()));
}

#[test]
fn a_writer_waits_for_room() {
    let console = console(0);
    let input: Vec<u8> = (0..3 * INPUT_LIMIT).map(|i| (i % 251) as u8).collect();
    let writer = thread::spawn({
        let (console, input) = (console.clone(), input.clone());
        move || console.write_all(&input, LONG)
    });
    let mut taken: Vec<u8> = Vec::new();
    let mut buffer = [0; 1000];
    let start = Instant::now();
    while taken.len() < input.len() && start.elapsed() < LONG {
        let count = console.take_input(&mut buffer);
        taken.extend(&buffer[..count]);
        if count == 0 {
            thread::yield_now();
        }
    }
    assert!(taken == input);
    assert_eq!(writer.join().unwrap(), input.len());
}

#[test]
fn closing_ends_the_wait_of_a_writer() {
    let console = console(0);
    let writer = thread::spawn({
        let console = console.clone();
        move || console.write_all(&[0; INPUT_LIMIT + 5], LONG)
    });
    thread::sleep(SHORT);
    let start = Instant::now();
    console.close();
    assert_eq!(writer.join().unwrap(), INPUT_LIMIT);
    assert!(start.elapsed() < LONG / 2);
}

#[test]
fn the_hook_is_called_for_input_that_was_taken() {
    let console = console(0);
    let calls = Arc::new(AtomicUsize::new(0));
    let hook = {
        let (console, calls) = (Arc::downgrade(&console), calls.clone());
        move || {
            // No lock is held here.
            console.upgrade().unwrap().take_input(&mut [0; 2]);
            calls.fetch_add(1, Ordering::SeqCst);
        }
    };
    console.on_input(Box::new(hook)).unwrap();
    assert!(matches!(console.on_input(Box::new(|| ())), Err(Error::Invalid(_))));
    assert_eq!(console.write(b"abc"), 3);
    assert_eq!(console.write(b""), 0);
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    let mut rest = [0; 9];
    assert_eq!(console.take_input(&mut rest), 1);
    assert_eq!(rest[0], b'c');
}

#[derive(Clone, Debug)]
enum Step {
    Append(Vec<u8>),
    NewReader,
    Read { reader: usize, max: usize },
    Tail(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Step::Append),
        Just(Step::NewReader),
        (0..8usize, 0..50usize).prop_map(|(reader, max)| Step::Read { reader, max }),
        (0..50usize).prop_map(Step::Tail),
    ]
}

proptest! {
    /// The model keeps all that was ever written.
    #[test]
    fn readers_get_what_a_naive_model_says(limit in 0..40usize, steps in prop::collection::vec(step(), 0..100)) {
        let console = console(limit);
        let mut all: Vec<u8> = Vec::new();
        let mut readers = Vec::new();
        for step in steps {
            let oldest = all.len().saturating_sub(limit);
            match step {
                Step::Append(bytes) => {
                    console.append_output(&bytes);
                    all.extend(bytes);
                }
                Step::NewReader => readers.push((console.reader(), oldest)),
                Step::Read { reader, max } => {
                    if let Some((reader, next)) = readers.get_mut(reader) {
                        let from = oldest.max(*next);
                        let to = all.len().min(from + max);
                        let expected = chunk(&all[from..to], (from - *next) as u64);
                        prop_assert_eq!(reader.read(max, AT_ONCE), expected);
                        *next = to;
                    }
                }
                Step::Tail(n) => {
                    let from = oldest.max(all.len().saturating_sub(n));
                    prop_assert_eq!(console.tail(n), &all[from..]);
                }
            }
            prop_assert_eq!(console.total(), all.len() as u64);
        }
    }
}
