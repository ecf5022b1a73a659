//! The console: the last bytes that the guest wrote, and the bytes that it is to read.
//!
//! Both sides are bounded. Output never waits: a reader that is too slow loses the oldest bytes, and is told how many.
//! Input waits for the guest in a queue; what does not fit is not taken.
//!
//! The output and the input have a lock each. No thread holds both, and neither is held while [`Console::on_input`]'s
//! function runs.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::allocation::reserve;
use crate::error::Error;

/// How many bytes of output a console keeps where nothing else was chosen.
pub const DEFAULT_OUTPUT_LIMIT: usize = 1 << 20;
/// How many bytes of output are copied where there is no memory for more.
const LITTLE: usize = 4 << 10;
/// How many bytes of input wait for the guest at most.
pub const INPUT_LIMIT: usize = 64 << 10;

/// What a guest writes to its console, and what it is to read from it. Of use to any number of threads at once.
pub struct Console {
    output_limit: usize,
    output: Mutex<Output>,
    /// There is more output, or the console was closed.
    more_output: Condvar,
    input: Mutex<Input>,
    /// The guest has read half of the input queue, or the console was closed.
    input_room: Condvar,
    on_input: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

struct Output {
    kept: VecDeque<u8>,
    /// Bytes written in all, those included that are not kept any more.
    total: u64,
    closed: bool,
}

struct Input {
    queue: VecDeque<u8>,
    closed: bool,
}

/// Reads a console's output, each byte once. Readers do not affect one another.
pub struct Reader {
    console: Arc<Console>,
    /// The next byte to read, counted from the first that the guest ever wrote.
    next: u64,
}

/// What one read gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chunk {
    /// The bytes; empty if there were none in time.
    pub bytes: Vec<u8>,
    /// How many bytes before these were dropped from the console before this reader got to them.
    pub lost: u64,
    /// Whether the console is closed and nothing is left after these bytes.
    pub ended: bool,
}

impl Default for Console {
    /// A console that keeps [`DEFAULT_OUTPUT_LIMIT`] bytes of output.
    fn default() -> Self {
        Self::new(DEFAULT_OUTPUT_LIMIT)
    }
}

impl Console {
    /// A console that keeps the last `output_limit` bytes of output. With 0 the output is only counted.
    pub fn new(output_limit: usize) -> Self {
        Self {
            output_limit,
            output: Mutex::new(Output {
                kept: VecDeque::new(),
                total: 0,
                closed: false,
            }),
            more_output: Condvar::new(),
            input: Mutex::new(Input {
                queue: VecDeque::new(),
                closed: false,
            }),
            input_room: Condvar::new(),
            on_input: OnceLock::new(),
        }
    }

    /// Has `hook` called after each write of input, on the thread that wrote it: the guest's device takes the input
    /// with [`Console::take_input`] and interrupts the guest. The hook must not write input itself.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the console has a device already.
    pub fn on_input(&self, hook: Box<dyn Fn() + Send + Sync>) -> Result<(), Error> {
        let taken = |_| Error::Invalid("this console belongs to a device already; make a console for each".into());
        self.on_input.set(hook).map_err(taken)
    }

    /// Adds output of the guest and drops the oldest if there is no room. After [`Console::close`] it does nothing.
    pub fn append_output(&self, bytes: &[u8]) {
        let mut output = self.output.lock();
        if output.closed {
            return;
        }
        let mut new = output.make_room(bytes, self.output_limit);
        if output.kept.try_reserve(new.len()).is_err() {
            // There is no memory for more: it keeps what it has room for.
            let limit = output.kept.capacity();
            new = output.make_room(new, limit);
        }
        output.kept.extend(new);
        output.total += bytes.len() as u64;
        drop(output);
        self.more_output.notify_all();
    }

    /// A reader of the output, from the oldest byte that is kept.
    pub fn reader(self: &Arc<Self>) -> Reader {
        Reader {
            console: self.clone(),
            next: self.output.lock().oldest(),
        }
    }

    /// The last `n` bytes of output, or fewer if fewer are kept or there is no memory for them.
    pub fn tail(&self, n: usize) -> Vec<u8> {
        let output = self.output.lock();
        let len = output.kept.len();
        let whole = output.copy(len.saturating_sub(n)..len);
        whole.unwrap_or_else(|| output.copy(len.saturating_sub(n.min(LITTLE))..len).unwrap_or_default())
    }

    /// How many bytes the guest has written in all.
    pub fn total(&self) -> u64 {
        self.output.lock().total
    }

    /// Adds input for the guest. Returns how many of the bytes fit: the first so many, none after
    /// [`Console::close`].
    pub fn write(&self, bytes: &[u8]) -> usize {
        let taken = self.input.lock().append(bytes);
        if taken > 0 {
            self.announce_input();
        }
        taken
    }

    /// Adds input for the guest and waits for room, until all is added, the console is closed, or `timeout` has
    /// passed. Returns how many of the bytes were added. Input of other threads may get between them.
    pub fn write_all(&self, bytes: &[u8], timeout: Duration) -> usize {
        let deadline = Instant::now().checked_add(timeout);
        let mut done = self.write(bytes);
        while done < bytes.len() {
            let mut input = self.input.lock();
            let mut in_time = true;
            while in_time && !input.closed && input.queue.len() > INPUT_LIMIT / 2 {
                in_time = wait(&self.input_room, &mut input, deadline);
            }
            let closed = input.closed;
            drop(input);
            done += self.write(&bytes[done..]);
            if closed || !in_time {
                break;
            }
        }
        done
    }

    /// Copies the first bytes of the input into the start of `buffer`, and leaves them where they are. Returns how many.
    pub fn peek_input(&self, buffer: &mut [u8]) -> usize {
        let input = self.input.lock();
        let count = buffer.len().min(input.queue.len());
        for (place, byte) in buffer.iter_mut().zip(&input.queue) {
            *place = *byte;
        }
        count
    }

    /// Moves input to the guest's device: fills the start of `buffer` and returns how many bytes that were.
    pub fn take_input(&self, buffer: &mut [u8]) -> usize {
        let mut input = self.input.lock();
        let count = buffer.len().min(input.queue.len());
        let before = input.queue.len();
        for (place, byte) in buffer.iter_mut().zip(input.queue.drain(..count)) {
            *place = byte;
        }
        // Not for each byte that the guest reads: a writer would be woken to add one byte.
        let has_room = before > INPUT_LIMIT / 2 && input.queue.len() <= INPUT_LIMIT / 2;
        drop(input);
        if has_room {
            self.input_room.notify_all();
        }
        count
    }

    /// Ends the output and the input and wakes all who wait. What is kept can still be read.
    pub fn close(&self) {
        self.output.lock().closed = true;
        self.more_output.notify_all();
        self.input.lock().closed = true;
        self.input_room.notify_all();
    }

    fn announce_input(&self) {
        if let Some(hook) = self.on_input.get() {
            hook();
        }
    }
}

impl Output {
    /// The oldest byte that is kept, counted from the first that the guest ever wrote.
    fn oldest(&self) -> u64 {
        self.total - self.kept.len() as u64
    }

    /// Drops the oldest, so that no more than `limit` bytes are kept with the new ones. Returns those to add.
    fn make_room<'a>(&mut self, bytes: &'a [u8], limit: usize) -> &'a [u8] {
        let new = &bytes[bytes.len().saturating_sub(limit)..];
        let excess = (self.kept.len() + new.len()).saturating_sub(limit);
        self.kept.drain(..excess);
        new
    }

    /// Copies a part of what is kept; `None` if there is no memory for it.
    fn copy(&self, part: Range<usize>) -> Option<Vec<u8>> {
        let mut copy = Vec::new();
        reserve(&mut copy, part.len()).ok()?;
        let (first, second) = self.kept.as_slices();
        let of_first = part.start.min(first.len())..part.end.min(first.len());
        let of_second = part.start.saturating_sub(first.len())..part.end.saturating_sub(first.len());
        copy.extend_from_slice(&first[of_first]);
        copy.extend_from_slice(&second[of_second]);
        Some(copy)
    }
}

impl Input {
    fn append(&mut self, bytes: &[u8]) -> usize {
        let room = if self.closed { 0 } else { INPUT_LIMIT - self.queue.len() };
        let new = &bytes[..bytes.len().min(room)];
        self.queue.extend(new);
        new.len()
    }
}

impl Reader {
    /// Reads `max` bytes at most. Waits until there is output, the console is closed, or `timeout` has passed. To be
    /// interruptible, call it with a short timeout, again and again.
    pub fn read(&mut self, max: usize, timeout: Duration) -> Chunk {
        let deadline = Instant::now().checked_add(timeout);
        let mut output = self.console.output.lock();
        while max > 0 && output.total == self.next && !output.closed {
            if !wait(&self.console.more_output, &mut output, deadline) {
                break;
            }
        }
        let oldest = output.oldest();
        let lost = oldest.saturating_sub(self.next);
        self.next += lost;
        // Both fit into a usize: what is kept is in memory.
        let start = (self.next - oldest) as usize;
        let end = output.kept.len().min(start.saturating_add(max));
        let whole = output.copy(start..end);
        let bytes = whole.unwrap_or_else(|| output.copy(start..end.min(start + LITTLE)).unwrap_or_default());
        self.next += bytes.len() as u64;
        Chunk {
            bytes,
            lost,
            ended: output.closed && output.total == self.next,
        }
    }
}

/// Waits to be woken. False if the deadline has passed; there is none if it is too far off to be a time.
fn wait<T>(condition: &Condvar, guard: &mut MutexGuard<'_, T>, deadline: Option<Instant>) -> bool {
    match deadline {
        Some(deadline) => !condition.wait_until(guard, deadline).timed_out(),
        None => {
            condition.wait(guard);
            true
        }
    }
}
