//! The configuration space of one device: 256 bytes, of which the guest can write some bits.

/// Bytes of the space.
pub(crate) const SIZE: usize = 256;

/// Offsets in the header.
pub(crate) mod offset {
    pub const COMMAND: usize = 0x04;
    pub const STATUS: usize = 0x06;
    pub const BAR0: usize = 0x10;
    pub const CAPABILITIES: usize = 0x34;
    /// Where the first capability is.
    pub const FIRST_CAPABILITY: usize = 0x40;
}

/// Command: the device answers at the addresses of its BARs.
pub(crate) const MEMORY: u16 = 1 << 1;
/// Command: the device may access memory.
const BUS_MASTER: u16 = 1 << 2;
const INTX_DISABLE: u16 = 1 << 10;
/// Status: there are capabilities.
const HAS_CAPABILITIES: u16 = 1 << 4;

/// What a device is.
pub(crate) struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, subclass and programming interface.
    pub class: u32,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// The bytes, and which bits of them the guest can change.
pub(crate) struct Config {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// The capability that the next one is linked from: the offset of that link.
    link: usize,
    /// Where the next capability goes.
    next: usize,
}

impl Config {
    pub(crate) fn new(identity: &Identity) -> Self {
        let mut config = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            link: offset::CAPABILITIES,
            next: offset::FIRST_CAPABILITY,
        };
        config.put(0x00, &identity.vendor.to_le_bytes());
        config.put(0x02, &identity.device.to_le_bytes());
        config.put(
            0x08,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        config.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        config.put(0x2e, &identity.subsystem.to_le_bytes());
        // Drivers and firmware keep the number of an interrupt line here; it means nothing.
        config.allow(0x3c, &[0xff]);
        config.allow(offset::COMMAND, &(MEMORY | BUS_MASTER | INTX_DISABLE).to_le_bytes());
        config
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Lets the guest change these bits.
    pub(crate) fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    /// Gives it a BAR 0: memory below 4 GiB, of a size that is a power of two, at an address that it has at first.
    pub(crate) fn set_bar(&mut self, address: u32, size: u32) {
        self.put(offset::BAR0, &address.to_le_bytes());
        self.allow(offset::BAR0, &(!(size - 1)).to_le_bytes());
    }

    /// Adds a capability: its id and what follows the link to the next. Returns its offset.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        self.bytes[self.link] = at as u8;
        self.bytes[at] = id;
        self.put(at + 2, body);
        self.put(offset::STATUS, &HAS_CAPABILITIES.to_le_bytes());
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// The bytes from `at` on; those past the end are ones.
    pub(crate) fn read(&self, at: usize, into: &mut [u8]) {
        for (byte, at) in into.iter_mut().zip(at..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Changes the bits that the guest can change.
    pub(crate) fn write(&mut self, at: usize, from: &[u8]) {
        for (new, at) in from.iter().zip(at..) {
            if let (Some(byte), Some(writable)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !writable | new & writable;
            }
        }
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> &[u8; SIZE] {
        &self.bytes
    }

    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    /// Where the device answers; `None` while the guest has turned that off.
    pub(crate) fn bar(&self) -> Option<u64> {
        (self.u16(offset::COMMAND) & MEMORY != 0).then(|| u64::from(self.u32(offset::BAR0) & !0xf))
    }
}
