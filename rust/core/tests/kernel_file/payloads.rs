//! The vmlinux inside of a bzImage.

use std::borrow::Cow;
use std::io::Read;

use pagegate_core::boot::kernel_file::KernelFile;
use pagegate_core::boot::kernel_file::payload::vmlinux;
use pagegate_core::error::Error;

use crate::compressed::{self, plain};
use crate::elf::{EM_X86_64, ET_EXEC, TEXT, elf};
use crate::image::{bzimage, bzimage_of};

fn unpack(image: Vec<u8>) -> Result<Vec<u8>, String> {
    let kernel = KernelFile::parse(image).unwrap();
    let vmlinux = vmlinux(&kernel, &mut || Ok(())).map_err(|error| error.to_string())?;
    Ok(vmlinux.into_owned())
}

/// A block in lz4's format, with its size before it: literals only.
fn lz4_block(bytes: &[u8]) -> Vec<u8> {
    let mut block = vec![0xf0];
    let more = bytes.len() - 15;
    block.extend(std::iter::repeat_n(255, more / 255));
    block.push((more % 255) as u8);
    block.extend(bytes);
    let size = (block.len() as u32).to_le_bytes();
    [&size[..], &block].concat()
}

#[test]
fn each_format() {
    let expected = plain();
    for (name, bytes) in compressed::all() {
        let found = unpack(bzimage_of(&bytes, expected.len() as u32));
        assert_eq!(found.as_ref(), Ok(&expected), "{name}");
    }
}

#[test]
fn a_vmlinux_is_its_own() {
    let file = elf(ET_EXEC, EM_X86_64, &[(TEXT, b"code")]);
    let kernel = KernelFile::parse(file.clone()).unwrap();
    assert!(matches!(vmlinux(&kernel, &mut || Ok(())), Ok(Cow::Borrowed(bytes)) if bytes == file));
}

#[test]
fn lz4_in_several_blocks_and_files() {
    let expected = [plain(), vec![7; 3000], vec![9; 20]].concat();
    let magic = b"\x02\x21\x4c\x18";
    let compressed = [
        &magic[..],
        &lz4_block(&plain()),
        &lz4_block(&[7; 3000]),
        magic,
        &lz4_block(&[9; 20]),
    ]
    .concat();
    assert_eq!(unpack(bzimage_of(&compressed, expected.len() as u32)), Ok(expected));
}

#[test]
fn another_size_than_the_file_says() {
    let real = plain().len() as u32;
    for (name, bytes) in compressed::all() {
        for (size, words) in [(real - 1, "more than"), (0, "more than"), (real + 1, "it has")] {
            let reason = unpack(bzimage_of(&bytes, size)).unwrap_err();
            // gzip notices itself that its own size is wrong.
            assert!(reason.contains(words) || name == "gzip", "{name}: {reason}");
            assert!(reason.contains("damaged"), "{name}: {reason}");
        }
    }
}

#[test]
fn a_size_above_the_limit() {
    for (_, bytes) in compressed::all() {
        let reason = unpack(bzimage_of(&bytes, (512 << 20) + 1)).unwrap_err();
        assert!(reason.contains("limit"), "{reason}");
    }
}

#[test]
fn a_large_size_takes_no_memory_beforehand() {
    for (name, bytes) in compressed::all() {
        let reason = unpack(bzimage_of(&bytes, 512 << 20)).unwrap_err();
        assert!(reason.contains("damaged"), "{name}: {reason}");
    }
}

#[test]
fn a_size_that_no_kernel_is_compressed_from() {
    for (name, bytes) in compressed::all() {
        let reason = unpack(bzimage_of(&bytes, 65 * bytes.len() as u32)).unwrap_err();
        assert!(reason.contains("cannot be"), "{name}: {reason}");
        let reason = unpack(bzimage_of(&bytes, 60 * bytes.len() as u32)).unwrap_err();
        assert!(!reason.contains("cannot be"), "{name}: {reason}");
    }
}

#[test]
fn payloads_that_cannot_be_read() {
    let lzo = unpack(bzimage_of(b"\x89LZO\0\r\n\x1a\n", 100)).unwrap_err();
    assert!(lzo.contains("lzo") && lzo.contains("not supported"), "{lzo}");
    let unknown = unpack(bzimage_of(b"what is this?", 100)).unwrap_err();
    assert!(unknown.contains("unknown way"), "{unknown}");
    let none = unpack(bzimage(b"")).unwrap_err();
    assert!(none.contains("names no compressed kernel"), "{none}");
    let short = unpack(bzimage(b"\x02\x21\x4c")).unwrap_err();
    assert!(short.contains("names no compressed kernel"), "{short}");
}

#[test]
fn a_payload_that_is_no_elf_file() {
    let block = [&b"\x02\x21\x4c\x18"[..], &lz4_block(&[1; 100])].concat();
    let reason = unpack(bzimage_of(&block, 100)).unwrap_err();
    assert!(reason.contains("no ELF file"), "{reason}");
}

#[test]
fn lz4_that_is_cut_off() {
    let block = [&b"\x02\x21\x4c\x18"[..], &lz4_block(&[1; 100])].concat();
    let reason = unpack(bzimage_of(&block[..block.len() - 1], 100)).unwrap_err();
    assert!(reason.contains("cut off"), "{reason}");
}

/// Decompresses it with a watch that fails when it is called for the nth time; returns how often it was called.
fn watched(image: Vec<u8>, nth: u32) -> (u32, Result<(), Error>) {
    let kernel = KernelFile::parse(image).unwrap();
    let mut calls = 0;
    let result = vmlinux(&kernel, &mut || {
        calls += 1;
        match calls == nth {
            true => Err("enough".into()),
            false => Ok(()),
        }
    });
    let result = result.map(|_| ());
    (calls, result)
}

#[test]
fn the_watch_interrupts_each_format() {
    for (name, bytes) in compressed::all() {
        let (calls, result) = watched(bzimage_of(&bytes, plain().len() as u32), 1);
        assert!(matches!(result, Err(Error::Interrupted(_))), "{name}: {result:?}");
        assert_eq!(calls, 1, "{name}");
    }
}

#[test]
fn the_watch_is_called_for_each_part() {
    // 3 MiB that are compressed by less than a half, as a kernel is.
    let mut random = 1_u32;
    let noise = (4..3 << 20).map(|_| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (random >> 28) as u8
    });
    let plain: Vec<u8> = b"\x7fELF".iter().copied().chain(noise).collect();
    let mut bzip2 = Vec::new();
    let encoder = bzip2::read::BzEncoder::new(&plain[..], bzip2::Compression::fast());
    { encoder }.read_to_end(&mut bzip2).unwrap();
    let mut gzip = Vec::new();
    let encoder = flate2::read::GzEncoder::new(&plain[..], flate2::Compression::fast());
    { encoder }.read_to_end(&mut gzip).unwrap();
    let mut lz4 = b"\x02\x21\x4c\x18".to_vec();
    plain.chunks(1 << 20).for_each(|block| lz4.extend(lz4_block(block)));
    let zstd = zstd::encode_all(&plain[..], 1).unwrap();
    for (name, bytes) in [("bzip2", bzip2), ("gzip", gzip), ("lz4", lz4), ("zstd", zstd)] {
        let image = bzimage_of(&bytes, plain.len() as u32);
        let (calls, result) = watched(image.clone(), u32::MAX);
        assert!(result.is_ok(), "{name}: {result:?}");
        assert!((3..=4).contains(&calls), "{name}: {calls}");
        let (calls, result) = watched(image, 3);
        assert!(matches!(result, Err(Error::Interrupted(_))), "{name}: {result:?}");
        assert_eq!(calls, 3, "{name}");
    }
}
