//! A queue in guest memory, as a driver writes it.

use std::cell::Cell;

use crate::driver::{EVENT_IDX, Host, USUAL, Virtio, status, wait};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where the parts of a queue usually are, each in a page of its own.
pub const DESCRIPTORS: u64 = 0x1_0000;
pub const AVAILABLE: u64 = 0x1_1000;
pub const USED: u64 = 0x1_2000;
pub const USUAL_PLACE: [u64; 3] = [DESCRIPTORS, AVAILABLE, USED];

/// A queue.
pub struct Rings<'a> {
    host: &'a Host,
    pub size: u16,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    offered: Cell<u16>,
}

/// A descriptor's bytes.
pub fn descriptor(gpa: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&gpa.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

impl<'a> Rings<'a> {
    /// Negotiates, and sets up queue 0 at the usual place.
    pub fn start(device: &Virtio<'a>, size: u16) -> Self {
        Self::start_in(device, size, USUAL_PLACE)
    }

    /// The same in another place, which the device can use. A device looks at its queues when the driver is ready, and then
    /// asks to be notified, which says that it has.
    pub fn start_in(device: &Virtio<'a>, size: u16, place: [u64; 3]) -> Self {
        let [_, _, used] = place;
        device.host.write(used, &[0xff; 2]);
        let rings = Self::start_at(device, size, place);
        wait("the device has looked", || device.host.read(used, 2) == [0; 2]);
        rings
    }

    /// The same anywhere.
    pub fn start_at(device: &Virtio<'a>, size: u16, place: [u64; 3]) -> Self {
        let offered = device.offered();
        let ready = device.negotiate(offered & !EVENT_IDX | USUAL);
        assert_ne!(ready & status::FEATURES_OK, 0);
        let rings = Self::queue(device, 0, size, place);
        device.drive();
        rings
    }

    /// Sets up a queue, before the driver is ready.
    pub fn queue(device: &Virtio<'a>, queue: u16, size: u16, place: [u64; 3]) -> Self {
        device.set_up(queue, size, place);
        let [descriptors, available, used] = place;
        Self {
            host: device.host,
            size,
            descriptors,
            available,
            used,
            offered: Cell::new(0),
        }
    }

    /// Writes an entry of the descriptor table.
    pub fn put(&self, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let at = self.descriptors + u64::from(index) * 16;
        self.host.write(at, &descriptor(gpa, len, flags, next));
    }

    /// Writes a chain from `first` on: for each buffer its address, its length, and whether the device is to write it.
    pub fn chain(&self, first: u16, buffers: &[(u64, u32, bool)]) {
        for ((gpa, len, write), index) in buffers.iter().zip(first..) {
            let last = usize::from(index - first) + 1 == buffers.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.put(index, *gpa, *len, flags, index + 1);
        }
    }

    /// Offers a chain to the device.
    pub fn offer(&self, head: u16) {
        let at = self.available + 4 + u64::from(self.offered.get() % self.size) * 2;
        self.host.write(at, &head.to_le_bytes());
        self.offered.set(self.offered.get().wrapping_add(1));
        self.set_available(self.offered.get());
    }

    pub fn set_available(&self, index: u16) {
        self.host.write(self.available + 2, &index.to_le_bytes());
    }

    /// How many requests the device has completed.
    pub fn completed(&self) -> u16 {
        let bytes = self.host.read(self.used + 2, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    }

    /// Waits until so many are completed.
    pub fn wait(&self, count: u16) {
        wait(&format!("{count} requests are completed"), || self.completed() == count);
    }

    /// The head and the count of bytes written of the nth completed request.
    pub fn entry(&self, n: u16) -> (u32, u32) {
        let bytes = self.host.read(self.used + 4 + u64::from(n % self.size) * 8, 8);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }
}
