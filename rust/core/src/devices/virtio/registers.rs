//! What a driver and its device agree on: the registers of "Common configuration structure layout".

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue as Ring, QueueT};

/// Bits of the device status.
pub(crate) mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

/// Features of every device. Requests may have a table of descriptors of their own.
const INDIRECT_DESC: u64 = 1 << 28;
/// Each side says from which request on it wants to be told.
const EVENT_IDX: u64 = 1 << 29;
/// The device is as the specification says, from version 1.0 on.
pub(crate) const VERSION_1: u64 = 1 << 32;
/// The device does not reach all of memory. Without it Linux would give it pages that are private.
const ACCESS_PLATFORM: u64 = 1 << 33;
const OF_ALL: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | ACCESS_PLATFORM;

/// No interrupt.
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// A queue as the driver has set it up.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct QueueRegisters {
    largest: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// The registers, as a snapshot has them.
#[derive(Deserialize, Serialize)]
pub(crate) struct SavedRegisters {
    accepted: u64,
    selects: [u32; 2],
    config_vector: u16,
    status: u8,
    resetting: bool,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// What has to follow a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum After {
    Nothing,
    /// The device's thread has something to do.
    Wake,
}

/// The registers.
#[derive(Debug)]
pub(crate) struct Registers {
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    config_vector: u16,
    /// The vectors that there are.
    vectors: u16,
    status: u8,
    /// The driver asked for a reset that the device's thread has not carried out. The thread looks at it between requests.
    resetting: Arc<AtomicBool>,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl Registers {
    pub(crate) fn new(features: u64, queues: &[u16], vectors: u16) -> Self {
        let queue = |largest: &u16| QueueRegisters {
            largest: *largest,
            size: *largest,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            driver: 0,
            device: 0,
        };
        Self {
            offered: features | OF_ALL,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            config_vector: NO_VECTOR,
            vectors,
            status: 0,
            resetting: Arc::default(),
            queue_select: 0,
            queues: queues.iter().map(queue).collect(),
        }
    }

    pub(crate) fn save(&self) -> SavedRegisters {
        SavedRegisters {
            accepted: self.accepted,
            selects: [self.device_select, self.driver_select],
            config_vector: self.config_vector,
            status: self.status,
            resetting: self.is_resetting(),
            queue_select: self.queue_select,
            queues: self.queues.clone(),
        }
    }

    /// Takes registers that were saved, unless a driver cannot have made them so.
    pub(crate) fn restore(&mut self, saved: SavedRegisters) -> Result<(), String> {
        let missing = saved.accepted & !self.offered;
        if saved.status & status::FEATURES_OK != 0 && missing != 0 {
            return Err(format!("its driver uses features that it does not have: {missing:#x}"));
        }
        let is_sound = |(queue, own): (&QueueRegisters, &QueueRegisters)| {
            queue.largest == own.largest && queue.size.is_power_of_two() && queue.size <= queue.largest
        };
        let mut pairs = saved.queues.iter().zip(&self.queues);
        if saved.queues.len() != self.queues.len() || !pairs.all(is_sound) {
            return Err("its queues are others".to_owned());
        }
        self.resetting.store(saved.resetting, Ordering::SeqCst);
        let vectors = self.vectors;
        let known = |vector| if vector < vectors { vector } else { NO_VECTOR };
        *self = Self {
            offered: self.offered,
            accepted: saved.accepted,
            device_select: saved.selects[0],
            driver_select: saved.selects[1],
            config_vector: known(saved.config_vector),
            vectors,
            status: saved.status,
            resetting: self.resetting.clone(),
            queue_select: saved.queue_select,
            queues: saved.queues,
        };
        for queue in &mut self.queues {
            queue.vector = known(queue.vector);
        }
        Ok(())
    }

    pub(crate) fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Whether the driver waits for a reset.
    pub(crate) fn resetting(&self) -> &Arc<AtomicBool> {
        &self.resetting
    }

    fn is_resetting(&self) -> bool {
        self.resetting.load(Ordering::SeqCst)
    }

    /// Whether the device is to work.
    pub(crate) fn is_live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::FAILED) == status::DRIVER_OK && !self.is_resetting()
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The vector of a queue.
    pub(crate) fn vector(&self, queue: u16) -> u16 {
        self.queues
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |queue| queue.vector)
    }

    /// The queues that the driver has enabled, for virtio-queue.
    pub(crate) fn rings(&self) -> Vec<Ring> {
        self.queues.iter().map(|queue| self.ring(queue)).collect()
    }

    fn ring(&self, queue: &QueueRegisters) -> Ring {
        let mut ring = Ring::new(queue.largest).unwrap_or_default();
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let (low, high) = halves(queue.descriptors);
        ring.set_desc_table_address(low, high);
        let (low, high) = halves(queue.driver);
        ring.set_avail_ring_address(low, high);
        let (low, high) = halves(queue.device);
        ring.set_used_ring_address(low, high);
        ring.set_size(queue.size);
        ring.set_event_idx(self.accepted & EVENT_IDX != 0);
        // An address that is not aligned was not taken.
        let taken = (ring.desc_table(), ring.avail_ring(), ring.used_ring());
        ring.set_ready(queue.enabled && taken == (queue.descriptors, queue.driver, queue.device));
        ring
    }

    /// The device cannot go on until it is reset.
    pub(crate) fn needs_reset(&mut self) {
        self.status |= status::NEEDS_RESET;
    }

    /// The device has forgotten everything.
    pub(crate) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.largest).collect();
        self.resetting.store(false, Ordering::SeqCst);
        *self = Self {
            resetting: self.resetting.clone(),
            ..Self::new(self.offered, &sizes, self.vectors)
        };
    }

    /// Reads a register, or a half of a 64-bit one. Other accesses read as zeroes.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8], generation: u8) {
        let queue = self.queues.get(usize::from(self.queue_select));
        let of_queue = |value: fn(&QueueRegisters) -> u64| queue.map_or(0, value);
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        let (value, size) = match offset {
            0x00 => (self.device_select.into(), 4),
            0x04 => (half(self.offered, self.device_select), 4),
            0x08 => (self.driver_select.into(), 4),
            0x0c => (half(self.accepted, self.driver_select), 4),
            0x10 => (self.config_vector.into(), 2),
            0x12 => (self.queues.len() as u64, 2),
            0x14 => (self.status.into(), 1),
            0x15 => (generation.into(), 1),
            0x16 => (self.queue_select.into(), 2),
            0x18 => (of_queue(|queue| queue.size.into()), 2),
            0x1a => (queue.map_or(NO_VECTOR, |queue| queue.vector).into(), 2),
            0x1c => (of_queue(|queue| queue.enabled.into()), 2),
            // A queue's place among the doorbells is its index.
            0x1e => (self.queue_select.into(), 2),
            0x20 => (of_queue(|queue| queue.descriptors & 0xffff_ffff), 4),
            0x24 => (of_queue(|queue| queue.descriptors >> 32), 4),
            0x28 => (of_queue(|queue| queue.driver & 0xffff_ffff), 4),
            0x2c => (of_queue(|queue| queue.driver >> 32), 4),
            0x30 => (of_queue(|queue| queue.device & 0xffff_ffff), 4),
            0x34 => (of_queue(|queue| queue.device >> 32), 4),
            _ => (0, 0),
        };
        let bytes: [u8; 8] = value.to_le_bytes();
        match into.len() == size {
            true => into.copy_from_slice(&bytes[..size]),
            false => into.fill(0),
        }
    }

    /// Writes a register, or a half of a 64-bit one. Others change nothing, nor do writes at the wrong time.
    pub(crate) fn write(&mut self, offset: u64, from: &[u8]) -> After {
        let mut bytes = [0; 8];
        let Some(start) = bytes.get_mut(..from.len()) else {
            return After::Nothing;
        };
        start.copy_from_slice(from);
        let value = u64::from_le_bytes(bytes);
        match (offset, from.len()) {
            (0x00, 4) => self.device_select = value as u32,
            (0x08, 4) => self.driver_select = value as u32,
            (0x0c, 4) => self.accept(value),
            (0x10, 2) => self.config_vector = self.known_vector(value as u16),
            (0x14, 1) => return self.set_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x18 | 0x1a | 0x1c, 2) | (0x20..=0x34, 4) => return self.write_queue(offset, value),
            _ => {}
        }
        After::Nothing
    }

    fn known_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    fn accept(&mut self, half: u64) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_select {
            0 => self.accepted = self.accepted & !0xffff_ffff | half,
            1 => self.accepted = self.accepted & 0xffff_ffff | half << 32,
            _ => {}
        }
    }

    fn set_status(&mut self, new: u8) -> After {
        if self.is_resetting() {
            return After::Nothing;
        }
        if new == 0 {
            if self.status & status::DRIVER_OK == 0 {
                self.reset();
                return After::Nothing;
            }
            // It reads as 0 once the device has let go of the guest's memory.
            self.resetting.store(true, Ordering::SeqCst);
            return After::Wake;
        }
        let before = self.status;
        let mut set = new & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED);
        let sound = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        let known = status::ACKNOWLEDGE | status::DRIVER;
        if new & status::FEATURES_OK != 0 && sound && (before | set) & known == known {
            set |= status::FEATURES_OK;
        }
        if new & status::DRIVER_OK != 0 && before & status::FEATURES_OK != 0 {
            set |= status::DRIVER_OK;
        }
        // A driver takes bits back by a reset only.
        self.status |= set;
        match self.status & !before & (status::DRIVER_OK | status::FAILED) != 0 {
            true => After::Wake,
            false => After::Nothing,
        }
    }

    /// Writes a register of the selected queue. One that is enabled stays as it is, but for its vector.
    fn write_queue(&mut self, offset: u64, value: u64) -> After {
        let vector = self.known_vector(value as u16);
        let live = self.is_live();
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return After::Nothing;
        };
        let low = |old: u64| old & !0xffff_ffff | value;
        let high = |old: u64| old & 0xffff_ffff | value << 32;
        match offset {
            0x1a => queue.vector = vector,
            _ if queue.enabled => {}
            0x18 if value.is_power_of_two() && value <= queue.largest.into() => queue.size = value as u16,
            // After DRIVER_OK it is too late.
            0x1c if value == 1 && !live => queue.enabled = true,
            0x20 => queue.descriptors = low(queue.descriptors),
            0x24 => queue.descriptors = high(queue.descriptors),
            0x28 => queue.driver = low(queue.driver),
            0x2c => queue.driver = high(queue.driver),
            0x30 => queue.device = low(queue.device),
            0x34 => queue.device = high(queue.device),
            _ => {}
        }
        After::Nothing
    }
}
