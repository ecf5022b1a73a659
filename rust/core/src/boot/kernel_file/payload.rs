//! The vmlinux inside of a bzImage, decompressed.

use std::borrow::Cow;
use std::io::{ErrorKind, Read};

use super::KernelFile;
use super::pace::no_memory;
use crate::allocation::{check_room, reserve};
use crate::errno::Errno;
use crate::error::Error;
use crate::input::Watch;

/// The most that a vmlinux may have, in bytes. Distributions' have some 60 MiB.
const LARGEST: usize = 512 << 20;
/// The most that it may have for each byte of the compressed kernel. Those of Linux have some 5.
const LARGEST_RATIO: usize = 64;
/// The most that the dictionary of xz and lzma may take, in KiB. Linux is built with at most 128 MiB.
const DICTIONARY_KIB: u32 = 300 << 10;
/// Memory is allocated beforehand for at most this many times the compressed size.
const USUAL_RATIO: usize = 8;
/// How many bytes are decompressed between two calls of the watch.
const PART: usize = 1 << 20;

const BZIP2: &str = "bzip2";
/// The most bytes that its decoder takes.
const BZIP2_DECODER: u64 = 4 << 20;

const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// The most bytes of a block in lz4's legacy format.
const LZ4_BLOCK: usize = 8 << 20;

/// The kernel's ELF file: `kernel` itself, or what its bzImage decompresses.
///
/// Takes as much memory as the vmlinux has, at most 512 MiB and 64 times the file's size, and up to as much again while
/// it decompresses; for xz and lzma up to 300 MiB more. `watch` is called again and again.
///
/// # Errors
/// `Invalid` if the payload is damaged, larger than 512 MiB, compressed in a way that is not supported (lzo), or no ELF
/// file; `Interrupted` for a failure of `watch`; `Host` if there is no memory.
pub fn vmlinux<'a>(kernel: &'a KernelFile, watch: &mut Watch<'_>) -> Result<Cow<'a, [u8]>, Error> {
    if !kernel.is_bzimage() {
        return Ok(Cow::Borrowed(kernel.bytes()));
    }
    let Some((compressed, &size)) = kernel.payload().and_then(<[u8]>::split_last_chunk::<4>) else {
        return refused("the bzImage's header names no compressed kernel");
    };
    let size = u32::from_le_bytes(size) as usize;
    if size > LARGEST {
        return refused(format!(
            "the kernel in the bzImage is said to have {size} bytes uncompressed, and the limit is {LARGEST}"
        ));
    }
    if size > compressed.len().saturating_mul(LARGEST_RATIO) {
        return refused(format!(
            "the kernel in the bzImage is damaged: {} bytes cannot be {size} bytes uncompressed; copy the file again",
            compressed.len()
        ));
    }
    let payload = Payload { compressed, size };
    let vmlinux = match *compressed {
        // The last word of gzip's own format is the size.
        [0x1f, 0x8b, ..] => payload.read(
            "gzip",
            flate2::bufread::GzDecoder::new(kernel.payload().unwrap_or_default()),
            watch,
        ),
        [b'B', b'Z', b'h', ..] => payload.read(BZIP2, bzip2::bufread::BzDecoder::new(compressed), watch),
        [0x5d, 0, 0, ..] => match lzma_rust2::LzmaReader::new_mem_limit(compressed, DICTIONARY_KIB, None) {
            Ok(reader) => payload.read("lzma", reader, watch),
            Err(error) => damaged("lzma", error),
        },
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => payload.read(
            "xz",
            lzma_rust2::XzReader::new_mem_limit(compressed, false, DICTIONARY_KIB),
            watch,
        ),
        [0x02, 0x21, 0x4c, 0x18, ..] => payload.lz4(watch),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => match zstd::Decoder::with_buffer(compressed) {
            Ok(reader) => payload.read("zstd", reader.single_frame(), watch),
            Err(error) => damaged("zstd", error),
        },
        [0x89, b'L', b'Z', b'O', ..] => refused(
            "the kernel is compressed with lzo, which is not supported; use one that is compressed otherwise \
                 (CONFIG_KERNEL_ZSTD=y), or its vmlinux",
        ),
        _ => refused("the kernel in the bzImage is compressed in an unknown way; use its vmlinux"),
    }?;
    if !vmlinux.starts_with(&object::elf::ELFMAG) {
        return refused("what the bzImage decompresses is no ELF file");
    }
    Ok(Cow::Owned(vmlinux))
}

struct Payload<'a> {
    /// Without the size.
    compressed: &'a [u8],
    /// Bytes when decompressed, as the file says.
    size: usize,
}

impl Payload<'_> {
    /// Everything that `reader` decompresses, which must have the size that the file says.
    fn read(&self, format: &str, mut reader: impl Read, watch: &mut Watch<'_>) -> Result<Vec<u8>, Error> {
        let mut out = self.buffer()?;
        if format == BZIP2 {
            // Without memory it says that the file is damaged.
            check_room(BZIP2_DECODER).map_err(no_memory)?;
        }
        // One byte more than expected shows that there is too much.
        while out.len() <= self.size {
            watch().map_err(Error::Interrupted)?;
            let part = PART.min(self.size + 1 - out.len());
            match reader.by_ref().take(part as u64).read_to_end(&mut out) {
                Ok(read) if read < part => break,
                Ok(_) => {}
                Err(error) if is_no_memory(&error) => return Err(no_memory(Errno(libc::ENOMEM))),
                Err(error) => return damaged(format, error),
            }
        }
        self.whole(format, out)
    }

    /// Blocks with a size before each, after the magic number: what "lz4 -l" writes.
    fn lz4(&self, watch: &mut Watch<'_>) -> Result<Vec<u8>, Error> {
        let mut out = self.buffer()?;
        let mut block = Vec::new();
        reserve(&mut block, LZ4_BLOCK).map_err(no_memory)?;
        let mut rest = self.compressed;
        while let Some((word, after)) = rest.split_first_chunk::<4>() {
            watch().map_err(Error::Interrupted)?;
            rest = after;
            // Files that were joined: each has the magic number.
            if *word == LZ4_MAGIC {
                continue;
            }
            let Some((packed, after)) = rest.split_at_checked(u32::from_le_bytes(*word) as usize) else {
                return damaged("lz4", "a block is cut off");
            };
            rest = after;
            block.resize(LZ4_BLOCK, 0);
            match lz4_flex::block::decompress_into(packed, &mut block) {
                Ok(length) => {
                    let part = block.get(..length).unwrap_or_default();
                    out.try_reserve(part.len())
                        .map_err(|_| no_memory(Errno(libc::ENOMEM)))?;
                    out.extend_from_slice(part);
                }
                Err(error) => return damaged("lz4", error),
            }
            if out.len() > self.size {
                break;
            }
        }
        self.whole("lz4", out)
    }

    /// An empty buffer for the output. It grows as bytes come, because the size in the file may be wrong.
    fn buffer(&self) -> Result<Vec<u8>, Error> {
        let mut buffer = Vec::new();
        reserve(&mut buffer, self.size.min(self.compressed.len() * USUAL_RATIO) + 1).map_err(no_memory)?;
        Ok(buffer)
    }

    fn whole(&self, format: &str, out: Vec<u8>) -> Result<Vec<u8>, Error> {
        if out.len() > self.size {
            return damaged(format, format!("it has more than the {} bytes that it says", self.size));
        }
        if out.len() < self.size {
            return damaged(
                format,
                format!("it has {} of the {} bytes that it says", out.len(), self.size),
            );
        }
        Ok(out)
    }
}

/// Whether a decoder had no memory. That of zstd says so in words only.
fn is_no_memory(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::OutOfMemory || error.to_string().contains("not enough memory")
}

fn damaged<T>(format: &str, why: impl std::fmt::Display) -> Result<T, Error> {
    refused(format!(
        "the kernel in the bzImage ({format}) is damaged: {why}; copy the file again"
    ))
}

fn refused<T>(why: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid(why.into()))
}
