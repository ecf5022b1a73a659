//! A driver that sets a device up once, and puts requests into its queues.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pagegate_core::devices::virtio::device::Device;
use pagegate_core::error::Error;
use pagegate_core::machine::report::Report;
use pagegate_core::policy::simple::Allow;

pub use crate::driver::PATIENCE;
use crate::driver::{Host, MEMORY, USUAL, Virtio, register, status};
use crate::rings::{NEXT, WRITE, descriptor};

/// How long a test waits to see that nothing happens.
pub const A_WHILE: Duration = Duration::from_millis(100);

/// Where a queue's parts are, and how far apart queues are.
const QUEUES: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Where buffers are, one after the other.
const BUFFERS: u64 = 0x8_0000;

/// A buffer of a request.
pub enum Part<'a> {
    /// The device reads these bytes.
    Read(&'a [u8]),
    /// The device may write so many.
    Write(u32),
}

/// A request that was put into a queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    pub head: u16,
    /// Where its buffers are.
    pub gpas: Vec<u64>,
}

struct QueueState {
    size: u16,
    doorbell: u64,
    descriptor: u16,
    sent: u16,
    seen: u16,
}

/// A machine that runs, with one device that is ready.
pub struct Driver {
    pub host: Host,
    /// Where the device's status is.
    status: u64,
    queues: Vec<QueueState>,
    next_buffer: u64,
}

fn queue_at(index: u64) -> u64 {
    QUEUES * (1 + index)
}

impl Driver {
    /// A machine with this device, which has what it offers.
    pub fn new(device: Arc<dyn Device>) -> Self {
        let (sizes, features) = (device.queues().to_vec(), device.features());
        let host = Host::new(Arc::new(Allow), vec![device]);
        let found = Virtio::find(&host, 1);
        assert_ne!(found.negotiate(features | USUAL) & status::FEATURES_OK, 0);
        let set_up = |(index, size): (u16, &u16)| {
            let at = queue_at(index.into());
            found.set_up(index, *size, [at, at + AVAILABLE, at + USED]);
            QueueState {
                size: *size,
                doorbell: found.doorbell(index),
                descriptor: 0,
                sent: 0,
                seen: 0,
            }
        };
        let queues = (0..).zip(&sizes).map(set_up).collect();
        found.drive();
        let status = found.common + register::STATUS;
        Self {
            host,
            status,
            queues,
            next_buffer: BUFFERS,
        }
    }

    /// Begins a further run.
    pub fn run(&mut self) {
        self.host.begin();
    }

    /// Adds a request, of which the device is not told yet.
    pub fn add(&mut self, queue: usize, parts: &[Part<'_>]) -> Sent {
        let at = queue_at(queue as u64);
        let size = self.queues[queue].size;
        let head = self.queues[queue].descriptor;
        let mut gpas = Vec::new();
        for (index, part) in (head..).zip(parts) {
            let gpa = self.next_buffer;
            let (len, flag) = match part {
                Part::Read(bytes) => {
                    self.host.write(gpa, bytes);
                    (bytes.len() as u32, 0)
                }
                Part::Write(len) => (*len, WRITE),
            };
            self.next_buffer += u64::from(len).next_multiple_of(64);
            let more = index != head + parts.len() as u16 - 1;
            let flags = flag | if more { NEXT } else { 0 };
            let entry = descriptor(gpa, len, flags, (index + 1) % size);
            self.host.write(at + u64::from(index % size) * 16, &entry);
            gpas.push(gpa);
        }
        assert!(self.next_buffer < MEMORY);
        let state = &mut self.queues[queue];
        state.descriptor = (head + parts.len() as u16) % size;
        let slot = at + AVAILABLE + 4 + u64::from(state.sent % size) * 2;
        state.sent = state.sent.wrapping_add(1);
        self.host.write(slot, &head.to_le_bytes());
        self.host.write(at + AVAILABLE + 2, &state.sent.to_le_bytes());
        Sent { head, gpas }
    }

    /// The next buffer is in another page.
    pub fn skip_to_next_page(&mut self) {
        self.next_buffer = self.next_buffer.next_multiple_of(4096);
    }

    /// Of the next two buffers the first, of 64 bytes at most, is the last in its page, and the second in the next one.
    pub fn skip_to_end_of_page(&mut self) {
        self.next_buffer = self.next_buffer.next_multiple_of(4096) + 4096 - 64;
    }

    /// Rings all doorbells.
    pub fn kick(&self) {
        for (index, queue) in (0_u16..).zip(&self.queues) {
            self.host.last_store(queue.doorbell, &index.to_le_bytes());
        }
    }

    /// Adds a request and rings.
    pub fn send(&mut self, queue: usize, parts: &[Part<'_>]) -> Sent {
        let sent = self.add(queue, parts);
        self.kick();
        sent
    }

    /// The next completed request, if there is one: its head, and the bytes that were written.
    pub fn completed(&mut self, queue: usize) -> Option<(u16, u32)> {
        let at = queue_at(queue as u64) + USED;
        let state = &mut self.queues[queue];
        if self.host.read(at + 2, 2) == state.seen.to_le_bytes() {
            return None;
        }
        let element = self.host.read(at + 4 + u64::from(state.seen % state.size) * 8, 8);
        state.seen = state.seen.wrapping_add(1);
        let [id, len] = [0, 4].map(|at| u32::from_le_bytes(element[at..at + 4].try_into().unwrap()));
        Some((id as u16, len))
    }

    /// Waits for the next completed request.
    pub fn wait(&mut self, queue: usize) -> (u16, u32) {
        let begun = Instant::now();
        loop {
            if let Some(completed) = self.completed(queue) {
                return completed;
            }
            assert!(begun.elapsed() < PATIENCE, "queue {queue}: no request is completed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Sends a request that the device reads, and waits until it is completed.
    pub fn put(&mut self, queue: usize, bytes: &[u8]) {
        let sent = self.send(queue, &[Part::Read(bytes)]);
        assert_eq!(self.wait(queue), (sent.head, 0));
    }

    pub fn read(&self, gpa: u64, len: u32) -> Vec<u8> {
        self.host.read(gpa, len as usize)
    }

    /// Resets the device. Nothing can be sent any more.
    pub fn reset(&mut self) {
        self.host.last_store(self.status, &[0]);
    }

    /// Waits until the run has ended by itself.
    pub fn ended(&mut self) -> Result<Report, Error> {
        self.host.over()
    }

    /// Ends the run.
    pub fn stop(&mut self) -> Report {
        self.host.stop().0.unwrap()
    }
}
