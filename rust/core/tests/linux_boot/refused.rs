//! What cannot be booted is refused with a sentence that has the numbers in it, before anything is written.

use pagegate_core::boot::linux::LinuxGuest;
use pagegate_core::memory::address::Range;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::guest::{
    CMDLINE_SIZE, GIB, INIT_SIZE, INITRD_ADDR_MAX, KERNEL_ALIGNMENT, KERNEL_AT, LOADFLAGS, MAGIC, MIB, PREF_ADDRESS,
    SETUP_SECTS, VERSION, XLOADFLAGS, bzimage, bzimage_with, guest, memory, pattern, range, refusal, vmlinux,
};

static MEMORY: [Range; 1] = [Range::new(0, 64 * MIB).unwrap()];

/// Checks that a guest with 64 MiB that `change` changed is refused, with these words in the message.
#[track_caller]
fn refused<'a>(kernel: &'a [u8], change: impl FnOnce(&mut LinuxGuest<'a>), words: &[&str]) {
    let memory = memory(&MEMORY);
    let mut guest = guest(kernel, &MEMORY);
    change(&mut guest);
    let message = refusal(&guest, &memory);
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

#[track_caller]
fn refused_ram(ram: &[Range], words: &[&str]) {
    refused(&bzimage(), |guest| guest.ram = ram, words);
}

#[test]
fn memory_that_linux_cannot_have() {
    refused_ram(&[], &["0", "ranges"]);
    refused_ram(&[range(0, 32 * MIB - 4096)], &["32764 KiB", "32 MiB"]);
    refused_ram(&[range(4096, 64 * MIB)], &["starts at 0", "0x1000"]);
    refused_ram(&[range(0, 4 * GIB)], &["0x100000000", "0xfec00000"]);
    refused_ram(&[range(0, GIB), range(2 * GIB, GIB)], &["0x80000000", "4 GiB"]);
    refused_ram(&[range(0, GIB), range(4 * GIB, GIB), range(6 * GIB, GIB)], &["in 3"]);
}

#[test]
fn memory_that_is_too_small_for_the_kernel() {
    let kernel = bzimage_with(INIT_SIZE, &(52 * MIB as u32 + 1).to_le_bytes());
    refused(&kernel, |_| (), &["53 MiB at 0x1000000", "69 MiB", "64 MiB"]);
    let largest = bzimage_with(INIT_SIZE, &[0xff; 4]);
    refused(&largest, |_| (), &["4096 MiB", "4112 MiB", "64 MiB"]);
    let mut long = bzimage();
    long.resize(49 * MIB as usize, 0);
    refused(&long, |_| (), &["49 MiB", "65 MiB", "64 MiB"]);
}

#[test]
fn memory_that_is_not_there() {
    let (kernel, ram) = (bzimage(), [range(0, 64 * MIB)]);
    let less = memory(&[range(0, 4096)]);
    let Err(error) = guest(&kernel, &ram).load(&less, &mut || Ok(())) else {
        panic!("it was loaded");
    };
    assert!(error.to_string().contains("guest memory"), "{error}");
}

#[test]
fn bzimages_that_are_none() {
    let header = bzimage()[..0x240].to_vec();
    for kernel in [&[][..], &[0; 4096], &header, b"HdrS"] {
        refused(kernel, |_| (), &["damaged"]);
    }
    refused(&bzimage_with(MAGIC, b"SrdH"), |_| (), &["setup header"]);
    refused(&bzimage_with(LOADFLAGS, &[0]), |_| (), &["setup header"]);
    refused(&bzimage_with(VERSION, &[11, 2]), |_| (), &["2.11", "64-bit"]);
    refused(&bzimage_with(XLOADFLAGS, &[2, 0]), |_| (), &["64-bit", "0x2"]);
    refused(&bzimage_with(SETUP_SECTS, &[255]), |_| (), &["131072", "bytes"]);
    // No sectors of setup code mean four.
    let mut short = bzimage_with(SETUP_SECTS, &[0]);
    short.truncate(2560 + 0x200);
    refused(&short, |_| (), &["3072", "2560"]);
    let alignment = bzimage_with(KERNEL_ALIGNMENT, &[0; 4]);
    refused(&alignment, |_| (), &["0x1000000", "kernel_alignment, 0x0"]);
    let odd = bzimage_with(PREF_ADDRESS, &0x110_0000_u64.to_le_bytes());
    refused(&odd, |_| (), &["0x1100000", "0x200000"]);
    let high = bzimage_with(PREF_ADDRESS, &GIB.wrapping_mul(4).to_le_bytes());
    refused(&high, |_| (), &["0x100000000", "4 GiB"]);
    refused(&bzimage_with(PREF_ADDRESS, &[0; 8]), |_| (), &["0x0", "1 MiB"]);
}

#[test]
fn vmlinuxes_that_do_not_fit() {
    let code = pattern(4096);
    let end = 64 * MIB;
    refused(
        &vmlinux(end - 4096, end - 4096, &code, 4097),
        |_| (),
        &["0x3fff000", "0x4000001", "0x4000000"],
    );
    refused(&vmlinux(0x8000, 0x8000, &code, 4096), |_| (), &["0x8000", "1 MiB"]);
    refused(
        &vmlinux(KERNEL_AT, KERNEL_AT, &code, u64::MAX),
        |_| (),
        &["0xffffffffffffffff"],
    );
    refused(
        &vmlinux(u64::MAX - 9, u64::MAX - 9, &code, 4096),
        |_| (),
        &["0xfffffffffffffff6"],
    );
    refused(
        &vmlinux(KERNEL_AT + 4096, KERNEL_AT, &code, 4096),
        |_| (),
        &["entry point", "0x1001000"],
    );
    refused(b"\x7fELF", |_| (), &["ELF"]);
}

#[test]
fn initrds_that_do_not_fit() {
    let kernel = bzimage();
    refused(&kernel, |guest| guest.initrd = Some(&[]), &["empty"]);
    let initrd = vec![0; 40 * MIB as usize + 1];
    refused(
        &kernel,
        |guest| guest.initrd = Some(&initrd),
        &["41943041", "0x1800000", "0x4000000", "more memory"],
    );
    let larger_than_memory = vec![0; 65 * MIB as usize];
    refused(
        &kernel,
        |guest| guest.initrd = Some(&larger_than_memory),
        &["68157440", "0x4000000"],
    );
    let limited = bzimage_with(INITRD_ADDR_MAX, &0x18f_ffff_u32.to_le_bytes());
    refused(
        &limited,
        |guest| guest.initrd = Some(&initrd[..2 << 20]),
        &["2097152", "0x1900000", "smaller"],
    );
    let nowhere = bzimage_with(INITRD_ADDR_MAX, &[0; 4]);
    refused(&nowhere, |guest| guest.initrd = Some(b"x"), &["1 bytes", "smaller"]);
}

#[test]
fn command_lines_that_the_kernel_does_not_take() {
    let long = "x".repeat(2048);
    refused(&bzimage(), |guest| guest.command_line = &long, &["2048", "2047"]);
    let code = pattern(4096);
    refused(
        &vmlinux(KERNEL_AT, KERNEL_AT, &code, MIB),
        |guest| guest.command_line = &long,
        &["2048", "2047"],
    );
    refused(
        &bzimage_with(CMDLINE_SIZE, &[255, 0, 0, 0]),
        |guest| guest.command_line = &long[..256],
        &["256", "255"],
    );
    let longer_than_the_room = "x".repeat(0x1_0000);
    let any = bzimage_with(CMDLINE_SIZE, &[0xff; 4]);
    refused(
        &any,
        |guest| guest.command_line = &longer_than_the_room,
        &["65536", "65535"],
    );
    for line in ["a\0b", "a\nb", "a\r"] {
        refused(
            &bzimage(),
            |guest| guest.command_line = line,
            &["one line", "after 1 bytes"],
        );
    }
}

#[test]
fn vcpus_that_the_tables_cannot_name() {
    for vcpus in [0, 256, u32::MAX] {
        refused(&bzimage(), |guest| guest.vcpus = vcpus, &[&vcpus.to_string(), "255"]);
    }
}

#[test]
fn private_bits_that_addresses_have() {
    let code = pattern(4096);
    let kernel = vmlinux(KERNEL_AT, KERNEL_AT, &code, MIB);
    for bit in [0, 12, 31, 52, 63, 64, u32::MAX] {
        let number = bit.to_string();
        refused(
            &kernel,
            |guest| guest.private_bit = Some(bit),
            &[&number, "from 32 to 51"],
        );
    }
    let ram = [range(0, GIB), range(4 * GIB, 4 * GIB + 4096)];
    let memory = memory(&ram);
    let mut large = guest(&kernel, &ram);
    large.private_bit = Some(33);
    assert!(refusal(&large, &memory).contains("from 34 to 51"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any header gives a guest whose entry point is in memory, or an error.
    #[test]
    fn damaged_files_are_loaded_or_refused(
        elf in any::<bool>(),
        changes in vec((0_usize..0x280, any::<u8>()), 0..12),
        length in prop_oneof![Just(usize::MAX), 0_usize..0x600],
        initrd in prop_oneof![Just(None), (0_usize..0x20_0000).prop_map(Some)],
    ) {
        let mut kernel = if elf { vmlinux(KERNEL_AT, KERNEL_AT, &pattern(4096), MIB) } else { bzimage() };
        for (at, byte) in changes {
            // The fields of an ELF file are in its first 120 bytes, those of a bzImage in 123 bytes further on.
            let at = if elf { at % 120 } else { 0x1f0 + at % 124 };
            kernel[at] = byte;
        }
        kernel.truncate(length);
        let initrd = initrd.map(|size| vec![1; size]);
        let ram = [range(0, 64 * MIB)];
        let mut guest = guest(&kernel, &ram);
        guest.is_bzimage = !elf;
        guest.initrd = initrd.as_deref();
        if let Ok(entry) = guest.load(&memory(&ram), &mut || Ok(())) {
            prop_assert!((MIB..64 * MIB).contains(&entry.rip));
        }
    }
}
