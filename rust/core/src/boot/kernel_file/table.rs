//! Symbols in the order of their addresses, all names in one string.

use super::pace::no_memory;
use super::vmlinux::KERNEL_START;
use crate::allocation::push;
use crate::errno::Errno;
use crate::error::Error;

/// The most symbols, and the most bytes of all names: several times what the largest kernels have. Nor are the names larger
/// than the vmlinux.
pub(super) const MOST_SYMBOLS: usize = 1 << 22;
const MOST_NAME_BYTES: usize = 128 << 20;
/// The longest name, in bytes. Linux allows 512.
pub(super) const LONGEST_NAME: usize = 1024;

#[derive(Clone)]
pub(super) struct Table {
    /// Above [`KERNEL_START`], ascending.
    offsets: Vec<u32>,
    /// Where each name ends in `names`.
    ends: Vec<u32>,
    names: String,
    most_name_bytes: usize,
}

impl Table {
    /// An empty one, for the symbols of this file.
    pub(super) fn new(vmlinux: &[u8]) -> Self {
        Self {
            offsets: Vec::new(),
            ends: Vec::new(),
            names: String::new(),
            most_name_bytes: vmlinux.len().min(MOST_NAME_BYTES),
        }
    }

    /// Adds a symbol after all others. Its address is that of the last one or above.
    pub(super) fn push(&mut self, address: u64, name: &[u8]) -> Result<(), Error> {
        if name.is_empty() || name.len() > LONGEST_NAME || !name.iter().all(u8::is_ascii_graphic) {
            let why = format!("the kernel's symbol at {address:#x} has no valid name");
            return Err(Error::Invalid(why));
        }
        let offset = address
            .checked_sub(KERNEL_START)
            .and_then(|offset| u32::try_from(offset).ok());
        let (Some(offset), Ok(name)) = (offset, std::str::from_utf8(name)) else {
            let why = format!("the kernel's symbol at {address:#x} is not in the kernel");
            return Err(Error::Invalid(why));
        };
        let end = self.names.len() + name.len();
        if self.offsets.len() >= MOST_SYMBOLS || end > self.most_name_bytes {
            return Err(too_many());
        }
        let room = self.names.try_reserve(name.len()).map_err(|_| Errno(libc::ENOMEM));
        room.map_err(no_memory)?;
        self.names.push_str(name);
        push(&mut self.offsets, offset).map_err(no_memory)?;
        push(&mut self.ends, end as u32).map_err(no_memory)
    }

    pub(super) fn shrink(&mut self) {
        self.offsets.shrink_to_fit();
        self.ends.shrink_to_fit();
        self.names.shrink_to_fit();
    }

    pub(super) fn count(&self) -> usize {
        self.offsets.len()
    }

    /// The last symbol at or below `address`, and its address; of several at one address the first.
    pub(super) fn at_or_below(&self, address: u64) -> Option<(&str, u64)> {
        let offset = u32::try_from(address.checked_sub(KERNEL_START)?).ok()?;
        let last = self.offsets.partition_point(|&other| other <= offset).checked_sub(1)?;
        let found = *self.offsets.get(last)?;
        let first = self.offsets.partition_point(|&other| other < found);
        Some((self.name(first)?, KERNEL_START + u64::from(found)))
    }

    /// The address of the first symbol with this name.
    pub(super) fn address(&self, name: &str) -> Option<u64> {
        let index = (0..self.count()).find(|&index| self.name(index) == Some(name))?;
        Some(KERNEL_START + u64::from(*self.offsets.get(index)?))
    }

    fn name(&self, index: usize) -> Option<&str> {
        let start = match index.checked_sub(1) {
            Some(before) => *self.ends.get(before)?,
            None => 0,
        };
        self.names.get(start as usize..*self.ends.get(index)? as usize)
    }
}

pub(super) fn too_many() -> Error {
    Error::Invalid(format!(
        "the kernel has more than {MOST_SYMBOLS} symbols, or more than {MOST_NAME_BYTES} bytes of names, or than it has itself"
    ))
}
