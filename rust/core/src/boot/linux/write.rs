//! Writing what a Linux guest starts with. A kernel or an initrd can have a GiB.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::error::Error;
use crate::input::Watch;

/// How many bytes are written between two calls of the watch.
const PART: usize = 64 << 20;

/// Writes bytes to guest memory, in parts.
pub(super) fn write<M: GuestMemoryBackend>(
    memory: &M,
    gpa: u64,
    bytes: &[u8],
    what: &str,
    watch: &mut Watch<'_>,
) -> Result<(), Error> {
    for (number, part) in bytes.chunks(PART).enumerate() {
        watch().map_err(Error::Interrupted)?;
        let written = memory.write_slice(part, GuestAddress(gpa + (number * PART) as u64));
        written.map_err(|cause| {
            let message = format!("the {what} cannot be written to guest memory at {gpa:#x}: {cause}");
            Error::Invalid(message)
        })?;
    }
    Ok(())
}
