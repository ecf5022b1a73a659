//! How much a trace's file may ask for. A few bytes can claim to be any number of events, so everything is counted
//! against the size of the file before memory is asked for.

/// A file has an event for at most this many of its bytes: what differs from one event to the next, as its time does,
/// cannot be compressed away.
const EVENT: u64 = 2;
/// Bytes may be uncompressed to this many times the file's size. An event has some 200.
const RATIO: u64 = 128;
/// What a file may have whatever its size is.
const SOME_EVENTS: u64 = 4096;
const SOME_BYTES: u64 = 16 << 20;

/// What is left of it.
pub(super) struct Limits {
    events: u64,
    bytes: u64,
    /// Bytes that were taken.
    taken: u64,
}

impl Limits {
    /// Of a file with `size` bytes.
    pub(super) fn of(size: u64) -> Self {
        Self {
            events: (size / EVENT).saturating_add(SOME_EVENTS),
            bytes: size.saturating_mul(RATIO).saturating_add(SOME_BYTES),
            taken: 0,
        }
    }

    /// Of events that are in memory already.
    pub(super) fn none() -> Self {
        Self {
            events: u64::MAX,
            bytes: u64::MAX,
            taken: 0,
        }
    }

    /// How many bytes something of it has uncompressed, as far as it was taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Takes `count` events.
    pub(super) fn events(&mut self, count: u64) -> Result<(), String> {
        let left = self.events.checked_sub(count);
        self.events = left.ok_or("it has more events than a file of its size can have")?;
        Ok(())
    }

    /// Takes `count` bytes, which the file says that something of it has uncompressed.
    pub(super) fn uncompressed(&mut self, count: i64) -> Result<(), String> {
        let count = u64::try_from(count).ok();
        let left = count.and_then(|count| self.bytes.checked_sub(count));
        self.bytes = left.ok_or("what is compressed in it would be too large for a file of its size")?;
        self.taken += count.unwrap_or_default();
        Ok(())
    }
}
