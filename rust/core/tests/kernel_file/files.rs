//! Which files are taken for a kernel, and why others are not.

use pagegate_core::boot::kernel_file::KernelFile;

use crate::elf::{EM_AARCH64, EM_S390, EM_X86_64, ET_DYN, ET_EXEC, ET_REL, TEXT, elf};
use crate::image::{SETUP_SECTS, VERSION, bzimage, put};

fn refusal(bytes: impl Into<Vec<u8>>) -> String {
    KernelFile::parse(bytes.into()).unwrap_err().to_string()
}

/// Refused, and the reason contains each of `words`.
fn refused(bytes: impl Into<Vec<u8>>, words: &[&str]) {
    let reason = refusal(bytes);
    for word in words {
        assert!(reason.contains(word), "{word:?} is not in {reason:?}");
    }
}

#[test]
fn a_bzimage() {
    let image = bzimage(b"payload.");
    assert!(KernelFile::looks_like_bzimage(&image));
    assert!(KernelFile::looks_like_bzimage(&image[..518]));
    assert!(!KernelFile::looks_like_bzimage(&image[..517]));
    let kernel = KernelFile::parse(image.clone()).unwrap();
    assert!(kernel.is_bzimage());
    assert_eq!(kernel.bytes(), image);
    assert_eq!(kernel.version(), Some(VERSION));
}

#[test]
fn a_vmlinux() {
    let file = elf(ET_EXEC, EM_X86_64, &[(0, b"per-CPU"), (TEXT, b"code")]);
    assert!(!KernelFile::looks_like_bzimage(&file));
    let kernel = KernelFile::parse(file.clone()).unwrap();
    assert!(!kernel.is_bzimage());
    assert_eq!(kernel.bytes(), file);
    assert_eq!(kernel.version(), None);
}

#[test]
fn a_signature_after_the_image_is_no_harm() {
    let mut image = bzimage(b"payload.");
    image.extend(b"a signature for secure boot");
    assert!(KernelFile::parse(image).is_ok());
}

#[test]
fn a_version_that_is_no_text_is_none() {
    let mut unprintable = bzimage(b"payload.");
    put(&mut unprintable, 0x300, b"6.9\x1b[2J");
    assert_eq!(KernelFile::parse(unprintable).unwrap().version(), None);

    let mut absent = bzimage(b"payload.");
    put(&mut absent, 0x20e, &[0, 0]);
    assert_eq!(KernelFile::parse(absent).unwrap().version(), None);

    let mut outside = bzimage(b"payload.");
    put(&mut outside, 0x20e, &[0xff, 0xff]);
    assert_eq!(KernelFile::parse(outside).unwrap().version(), None);

    let mut endless = bzimage(b"payload.");
    let setup = (usize::from(SETUP_SECTS) + 1) * 512;
    endless[0x300..setup].fill(b'x');
    assert_eq!(KernelFile::parse(endless).unwrap().version(), None);
}

#[test]
fn bzimages_that_are_cut_off() {
    let image = bzimage(b"payload.");
    for length in [518, 0x267, 0x268, 600, 1023, image.len() - 1] {
        refused(&image[..length], &["cut off", &length.to_string()]);
    }
}

#[test]
fn a_payload_outside_of_the_file() {
    let mut image = bzimage(b"payload.");
    put(&mut image, 0x24c, &u32::MAX.to_le_bytes());
    refused(image, &["damaged", "ends at byte"]);
}

#[test]
fn bzimages_without_a_64_bit_entry() {
    let mut old = bzimage(b"payload.");
    put(&mut old, 0x206, &0x020b_u16.to_le_bytes());
    refused(old, &["2.11", "64-bit", "3.8"]);

    let mut narrow = bzimage(b"payload.");
    put(&mut narrow, 0x236, &0x7e_u16.to_le_bytes());
    refused(narrow, &["32-bit", "x86-64"]);

    let mut low = bzimage(b"payload.");
    low[0x211] = 0;
    refused(low, &["zImage", "use a bzImage"]);
}

#[test]
fn files_that_are_no_kernel() {
    let image_of = |magic: &[u8]| {
        let mut file = b"MZ".to_vec();
        file.resize(0x38, 0);
        file.extend(magic);
        file
    };
    let known: [(Vec<u8>, &str); 14] = [
        (vec![], "empty"),
        (image_of(b"ARM\x64"), "arm64"),
        (image_of(b"RSC\x05"), "RISC-V"),
        (b"MZ\0\0zimg".to_vec(), "zboot"),
        (image_of(b"\x80\0\0\0PE\0\0"), "EFI"),
        (b"070701000000".to_vec(), "give this file as the initrd"),
        (b"\xc7\x71".to_vec(), "initrd"),
        (b"\x1f\x8b\x08".to_vec(), "gzip"),
        (b"\xfd7zXZ\0".to_vec(), "xz"),
        (b"\x28\xb5\x2f\xfd".to_vec(), "zstd"),
        (b"\x04\x22\x4d\x18".to_vec(), "lz4"),
        (b"BZh9".to_vec(), "bzip2"),
        (b"#!/bin/sh\n".to_vec(), "not a kernel"),
        (b"\x7fEL".to_vec(), "not a kernel"),
    ];
    for (bytes, word) in known {
        refused(bytes, &[word, "use a bzImage"]);
    }
}

#[test]
fn elf_files_that_are_no_vmlinux() {
    let code: [(u64, &[u8]); 1] = [(TEXT, b"code")];
    refused(elf(ET_EXEC, EM_AARCH64, &code), &["arm64"]);
    refused(elf(ET_EXEC, EM_S390, &code), &["e_machine 22"]);
    refused(elf(ET_REL, EM_X86_64, &[]), &["kernel module"]);
    refused(elf(ET_DYN, EM_X86_64, &code), &["shared library"]);
    refused(elf(7, EM_X86_64, &code), &["e_type 7"]);
    refused(elf(ET_EXEC, EM_X86_64, &[(0x40_0000, b"code")]), &["a program"]);
    refused(elf(ET_EXEC, EM_X86_64, &[]), &["a program"]);

    let mut narrow = elf(ET_EXEC, EM_X86_64, &code);
    narrow[4] = 1;
    refused(narrow, &["32-bit"]);
    let mut big_endian = elf(ET_EXEC, EM_X86_64, &code);
    big_endian[5] = 2;
    refused(big_endian, &["damaged"]);
}

#[test]
fn elf_files_that_are_cut_off() {
    let file = elf(ET_EXEC, EM_X86_64, &[(TEXT, b"code")]);
    refused(&file[..file.len() - 1], &["cut off"]);
    refused(&file[..100], &["cut off"]);
    refused(&file[..40], &["cut off"]);
    refused(&file[..4], &["damaged"]);
}

#[test]
fn a_segment_that_wraps_around() {
    let file = elf(ET_EXEC, EM_X86_64, &[(u64::MAX - 1, b"code")]);
    refused(file, &["outside of the address space"]);
}
