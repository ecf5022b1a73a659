//! What is where in memory, read back by other means than it was written.

use pagegate_core::boot::linux::tables::{CODE_SELECTOR, DATA_SELECTOR, GDT_SIZE};
use pagegate_core::devices::power::Power;

use crate::guest::{
    BOOT_FLAG, CMD_LINE_PTR, CMDLINE_SIZE, CODE32_START, GIB, HEADER_END, INIT_SIZE, INIT_SIZE_VALUE, INITRD_ADDR_MAX,
    JUMP, KERNEL_ALIGNMENT, KERNEL_AT, LOADFLAGS, MAGIC, MIB, PREF_ADDRESS, RAMDISK_IMAGE, RAMDISK_SIZE, SETUP,
    TYPE_OF_LOADER, VERSION, XLOADFLAGS, bzimage, bzimage_with, guest, load, pattern, put, range, vmlinux,
};

/// The end of memory where the second range starts at 4 GiB.
const HOLE: u64 = 3 * GIB;

#[test]
fn a_bzimage_is_where_it_wants_to_be() {
    let kernel = bzimage();
    let ram = [range(0, 64 * MIB)];
    let loaded = load(&guest(&kernel, &ram));
    assert_eq!(loaded.bytes(KERNEL_AT, kernel.len() - SETUP), kernel[SETUP..]);
    assert_eq!(loaded.entry.rip, KERNEL_AT + 0x200);
    assert_eq!(loaded.parameter(CODE32_START), KERNEL_AT as u32);
}

#[test]
fn four_sectors_of_setup_code_are_not_mentioned() {
    let mut kernel = bzimage_with(0x1f1, &[0]);
    kernel.splice(SETUP..SETUP, [0; 3 * 512]);
    let ram = [range(0, 64 * MIB)];
    let loaded = load(&guest(&kernel, &ram));
    assert_eq!(loaded.bytes(KERNEL_AT, 10_000), pattern(10_000));
}

#[test]
fn a_vmlinux_is_at_its_physical_addresses() {
    let code = pattern(5000);
    let ram = [range(0, 64 * MIB)];
    // As in kernels with CONFIG_PHYSICAL_START: the entry point is a physical address; in others it is a virtual one.
    for entry in [0x0100_0123, 0xffff_ffff_8100_0123] {
        let kernel = vmlinux(entry, KERNEL_AT, &code, 6 * MIB);
        let loaded = load(&guest(&kernel, &ram));
        assert_eq!(loaded.entry.rip, 0x0100_0123);
        assert_eq!(loaded.bytes(KERNEL_AT, code.len()), code);
        assert_eq!(
            loaded.bytes(loaded.entry.rsi + BOOT_FLAG as u64, 2),
            0xaa55_u16.to_le_bytes()
        );
        assert_eq!(loaded.parameter(MAGIC).to_le_bytes(), *b"HdrS");
        assert_eq!(loaded.parameter(VERSION) & 0xffff, 0x20f);
        assert_eq!(loaded.parameter(LOADFLAGS) & 0xff, 1);
        assert!(loaded.parameter(KERNEL_ALIGNMENT).is_power_of_two());
        assert_eq!(loaded.parameter(TYPE_OF_LOADER) & 0xff, 0xff);
    }
}

#[test]
fn boot_parameters_are_the_header_of_the_file_and_what_the_loader_says() {
    let kernel = bzimage();
    let ram = [range(0, 64 * MIB)];
    let loaded = load(&guest(&kernel, &ram));
    let at = loaded.entry.rsi as usize;
    let low = loaded.bytes(0, at + 4096);
    let mut expected = vec![0; 4096];
    put(&mut expected, 0x70, &0xe_0000_u64.to_le_bytes());
    put(&mut expected, 0x1f1, &kernel[0x1f1..HEADER_END]);
    expected[TYPE_OF_LOADER] = 0xff;
    put(&mut expected, CODE32_START, &(KERNEL_AT as u32).to_le_bytes());
    put(&mut expected, CMD_LINE_PTR, &0x2_0000_u32.to_le_bytes());
    expected[0x1e8] = low[at + 0x1e8];
    put(&mut expected, 0x2d0, &low[at + 0x2d0..at + 0xcd0]);
    assert_eq!(low[at..], expected, "all but the memory map, which has its own tests");
}

#[test]
fn no_more_of_the_file_is_taken_for_the_header_than_it_says() {
    // The header ends before init_size, as in boot protocol 2.09; what follows is code.
    let mut kernel = bzimage_with(INIT_SIZE, &[0xee; HEADER_END - INIT_SIZE]);
    put(&mut kernel, JUMP, &[(INIT_SIZE - MAGIC) as u8]);
    let ram = [range(0, 64 * MIB)];
    let loaded = load(&guest(&kernel, &ram));
    assert_eq!(loaded.parameter(INIT_SIZE), 0);
    assert_eq!(loaded.u64(loaded.entry.rsi + PREF_ADDRESS as u64), KERNEL_AT);
}

#[test]
fn the_command_line_ends_with_nul() {
    let kernel = bzimage();
    let ram = [range(0, 64 * MIB)];
    for line in ["", "quiet name=\u{e9}", &"x".repeat(2047)] {
        let mut guest = guest(&kernel, &ram);
        guest.command_line = line;
        let loaded = load(&guest);
        let at = loaded.parameter(CMD_LINE_PTR).into();
        assert_eq!(loaded.bytes(at, line.len() + 1), [line.as_bytes(), b"\0"].concat());
    }
}

#[test]
fn a_long_command_line_ends_below_the_kernels_first_memory() {
    let kernel = bzimage_with(CMDLINE_SIZE, &[0xff; 4]);
    let ram = [range(0, 64 * MIB)];
    let mut guest = guest(&kernel, &ram);
    let line = "y".repeat(0xffff);
    guest.command_line = &line;
    let loaded = load(&guest);
    assert_eq!(loaded.bytes(0x2_0000, 0x1_0000), [line.as_bytes(), b"\0"].concat());
}

#[test]
fn the_initrd_is_as_high_as_it_can_be() {
    let ram = [range(0, HOLE), range(4 * GIB, GIB)];
    let small = [range(0, 32 * MIB)];
    let code = pattern(5000);
    let vmlinux = vmlinux(KERNEL_AT, KERNEL_AT, &code, MIB);
    let low = bzimage_with(INITRD_ADDR_MAX, &0x37ff_ffff_u32.to_le_bytes());
    let odd = bzimage_with(INITRD_ADDR_MAX, &0x3800_0abc_u32.to_le_bytes());
    let bzimage = bzimage();
    let initrd = pattern(3 * MIB as usize + 17);
    let expected = [
        (&bzimage, &small[..], 32 * MIB),
        (&vmlinux, &small[..], 32 * MIB),
        (&bzimage, &ram[..], 2 * GIB),
        (&vmlinux, &ram[..], 2 * GIB),
        (&low, &ram[..], 0x3800_0000),
        (&odd, &ram[..], 0x3800_0abd),
    ];
    for (kernel, ram, end) in expected {
        let mut guest = guest(kernel, ram);
        guest.initrd = Some(&initrd);
        let loaded = load(&guest);
        let at = u64::from(loaded.parameter(RAMDISK_IMAGE));
        assert_eq!(at % 4096, 0);
        assert!(at + initrd.len() as u64 <= end, "{at:#x} is too high");
        assert!(at + 4096 + initrd.len() as u64 > end, "{at:#x} could be higher");
        assert_eq!(loaded.parameter(RAMDISK_SIZE) as usize, initrd.len());
        assert_eq!(loaded.bytes(at, initrd.len()), initrd);
    }
}

#[test]
fn an_initrd_may_begin_where_the_kernel_ends() {
    let kernel = bzimage();
    let ram = [range(0, 32 * MIB)];
    let initrd = pattern((32 * MIB - KERNEL_AT - INIT_SIZE_VALUE) as usize);
    let mut guest = guest(&kernel, &ram);
    guest.initrd = Some(&initrd);
    let loaded = load(&guest);
    assert_eq!(u64::from(loaded.parameter(RAMDISK_IMAGE)), KERNEL_AT + INIT_SIZE_VALUE);
}

#[test]
fn without_an_initrd_the_boot_parameters_name_none() {
    // The file's own values are not those of a loader.
    let mut kernel = bzimage_with(RAMDISK_IMAGE, &[0x55; 4]);
    put(&mut kernel, RAMDISK_SIZE, &[0x66; 4]);
    let ram = [range(0, 64 * MIB)];
    let loaded = load(&guest(&kernel, &ram));
    assert_eq!(
        (loaded.parameter(RAMDISK_IMAGE), loaded.parameter(RAMDISK_SIZE)),
        (0, 0)
    );
}

#[test]
fn the_memory_map_is_the_memory() {
    let kernel = bzimage();
    for (low, high) in [
        (32 * MIB, 0),
        (100 * MIB + 4096, 0),
        (HOLE, 0),
        (HOLE, 4096),
        (HOLE, 5 * GIB),
    ] {
        let mut ram = vec![range(0, low)];
        let mut expected = vec![
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0xe_0000, 2),
            (0xe_0000, 0xf_0000, 3),
            (0xf_0000, MIB, 2),
            (MIB, low, 1),
        ];
        if high > 0 {
            ram.push(range(4 * GIB, high));
            expected.push((4 * GIB, 4 * GIB + high, 1));
        }
        let map = load(&guest(&kernel, &ram)).e820();
        assert_eq!(map, expected);
        assert_eq!(map.iter().map(|(start, end, _)| end - start).sum::<u64>(), low + high);
    }
}

#[test]
fn page_tables_map_four_gib_to_themselves_and_memory_is_private() {
    let code = pattern(5000);
    let kernel = vmlinux(KERNEL_AT, KERNEL_AT, &code, MIB);
    let odd = 48 * MIB + 4096;
    for (ram, bit) in [
        (vec![range(0, odd)], None),
        (vec![range(0, odd)], Some(51)),
        (vec![range(0, 32 * MIB)], Some(32)),
        (vec![range(0, HOLE), range(4 * GIB, 4 * GIB)], Some(33)),
    ] {
        let mut guest = guest(&kernel, &ram);
        guest.private_bit = bit;
        let loaded = load(&guest);
        let mask = bit.map_or(0, |bit| 1 << bit);
        assert_eq!(loaded.entry.cr3 & mask, mask);
        for page in (0..4 * GIB).step_by(2 * MIB as usize) {
            let (gpa, private) = loaded.walk(page + 0x1234, mask);
            assert_eq!(gpa, page + 0x1234);
            let memory = page < ram[0].end();
            assert_eq!(private, memory || mask == 0, "{page:#x}");
        }
    }
}

#[test]
fn only_the_first_four_gib_are_mapped() {
    let kernel = bzimage();
    let ram = [range(0, HOLE), range(4 * GIB, GIB)];
    let loaded = load(&guest(&kernel, &ram));
    let pdpt = loaded.u64(loaded.entry.cr3) & !0xfff;
    assert!((1..512).all(|entry| loaded.u64(loaded.entry.cr3 + 8 * entry) == 0));
    assert!((4..512).all(|entry| loaded.u64(pdpt + 8 * entry) == 0));
}

#[test]
fn the_gdt_has_the_segments_of_the_boot_protocol() {
    let kernel = bzimage();
    let ram = [range(0, 64 * MIB)];
    let loaded = load(&guest(&kernel, &ram));
    let descriptor = |selector: u16| {
        assert!(selector + 8 <= GDT_SIZE);
        loaded.u64(loaded.entry.gdt + u64::from(selector))
    };
    assert_eq!((CODE_SELECTOR, DATA_SELECTOR), (0x10, 0x18));
    assert_eq!(descriptor(0), 0);
    let (code, data) = (descriptor(CODE_SELECTOR), descriptor(DATA_SELECTOR));
    // Present, ring 0, code that can be read or data that can be written; the code is 64-bit code.
    assert_eq!((code >> 40 & 0xfe, data >> 40 & 0xfe), (0x9a, 0x92));
    assert_eq!((code >> 53 & 0b11, data >> 54 & 1), (0b01, 1));
}

#[test]
fn the_stack_is_memory_of_its_own() {
    let kernel = bzimage();
    let ram = [range(0, 64 * MIB)];
    let loaded = load(&guest(&kernel, &ram));
    assert_eq!(loaded.entry.rsp % 16, 0);
    assert_eq!(loaded.bytes(loaded.entry.rsp - 4096, 4096), [0; 4096]);
    assert_eq!(
        loaded.parameter(XLOADFLAGS) & 1,
        1,
        "and the boot parameters, which are next to it, are whole"
    );
}

#[test]
fn a_jump_to_the_bios_writes_the_reset_register() {
    let kernel = bzimage();
    let ram = [range(0, 64 * MIB)];
    let code = load(&guest(&kernel, &ram)).bytes(0xf_fff0, 16);
    let [low, high] = Power::RESET.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al
    assert_eq!(code[..6], [0xba, low, high, 0xb0, Power::RESET_VALUE, 0xee]);
    // cli; hlt; and back to the hlt, which is 3 bytes before the end of the jump.
    assert_eq!(code[6..], [0xfa, 0xf4, 0xeb, 0xfd, 0, 0, 0, 0, 0, 0]);
}
