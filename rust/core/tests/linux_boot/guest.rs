//! Made-up kernels, and what is read back of a loaded guest, at the offsets of the boot protocol's documentation.

use pagegate_core::boot::linux::{Entry, LinuxGuest};
use pagegate_core::error::Error;
use pagegate_core::memory::address::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Where fields are in a bzImage and in the boot parameters.
pub const SETUP_SECTS: usize = 0x1f1;
pub const BOOT_FLAG: usize = 0x1fe;
pub const JUMP: usize = 0x201;
pub const MAGIC: usize = 0x202;
pub const VERSION: usize = 0x206;
pub const TYPE_OF_LOADER: usize = 0x210;
pub const LOADFLAGS: usize = 0x211;
pub const CODE32_START: usize = 0x214;
pub const RAMDISK_IMAGE: usize = 0x218;
pub const RAMDISK_SIZE: usize = 0x21c;
pub const CMD_LINE_PTR: usize = 0x228;
pub const INITRD_ADDR_MAX: usize = 0x22c;
pub const KERNEL_ALIGNMENT: usize = 0x230;
pub const XLOADFLAGS: usize = 0x236;
pub const CMDLINE_SIZE: usize = 0x238;
pub const PREF_ADDRESS: usize = 0x258;
pub const INIT_SIZE: usize = 0x260;
pub const HEADER_END: usize = 0x26c;

/// The bytes of the setup code in a made-up bzImage: the boot sector and one more.
pub const SETUP: usize = 1024;
pub const KERNEL_AT: u64 = 16 * MIB;
pub const INIT_SIZE_VALUE: u64 = 8 * MIB;

pub fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Bytes of which no page is like another.
pub fn pattern(size: usize) -> Vec<u8> {
    (0..size).map(|i| (i ^ i >> 8 ^ i >> 12) as u8 | 1).collect()
}

/// A bzImage that wants 8 MiB at 16 MiB.
pub fn bzimage() -> Vec<u8> {
    let mut file = vec![0xcc; SETUP];
    file[SETUP_SECTS..HEADER_END].fill(0);
    file[SETUP_SECTS] = 1;
    put(&mut file, BOOT_FLAG, &0xaa55_u16.to_le_bytes());
    put(&mut file, JUMP, &[(HEADER_END - MAGIC) as u8]);
    put(&mut file, MAGIC, b"HdrS");
    put(&mut file, VERSION, &0x20f_u16.to_le_bytes());
    put(&mut file, LOADFLAGS, &[1]);
    put(&mut file, CODE32_START, &0x10_0000_u32.to_le_bytes());
    put(&mut file, INITRD_ADDR_MAX, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut file, KERNEL_ALIGNMENT, &0x20_0000_u32.to_le_bytes());
    put(&mut file, XLOADFLAGS, &1_u16.to_le_bytes());
    put(&mut file, CMDLINE_SIZE, &2047_u32.to_le_bytes());
    put(&mut file, PREF_ADDRESS, &KERNEL_AT.to_le_bytes());
    put(&mut file, INIT_SIZE, &(INIT_SIZE_VALUE as u32).to_le_bytes());
    file.extend(pattern(10_000));
    file
}

/// [`bzimage`] with one field changed.
pub fn bzimage_with(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut file = bzimage();
    put(&mut file, at, bytes);
    file
}

/// A vmlinux with one segment, `bytes` at `paddr` and linked at -2 GiB above that, that takes `memsz` bytes of memory.
pub fn vmlinux(entry: u64, paddr: u64, bytes: &[u8], memsz: u64) -> Vec<u8> {
    let vaddr = paddr.wrapping_add(0xffff_ffff_8000_0000);
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [entry, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for word in [120, vaddr, paddr, bytes.len() as u64, memsz, 4096] {
        file.extend(word.to_le_bytes());
    }
    file.extend(bytes);
    file
}

pub fn range(gpa: u64, size: u64) -> Range {
    Range::new(gpa, size).unwrap()
}

/// A guest with `kernel`, which is a bzImage if it is no ELF file, and otherwise with what most tests take.
pub fn guest<'a>(kernel: &'a [u8], ram: &'a [Range]) -> LinuxGuest<'a> {
    LinuxGuest {
        kernel,
        is_bzimage: !kernel.starts_with(b"\x7fELF"),
        initrd: None,
        command_line: "console=ttyS0",
        ram,
        vcpus: 2,
        private_bit: None,
        pci: false,
    }
}

/// A guest that was loaded.
pub struct Loaded {
    pub memory: GuestMemoryMmap,
    pub entry: Entry,
}

/// Memory with these ranges, all zeroes.
pub fn memory(ram: &[Range]) -> GuestMemoryMmap {
    let ranges: Vec<_> = ram
        .iter()
        .map(|range| (GuestAddress(range.gpa()), range.size() as usize))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

pub fn load(guest: &LinuxGuest) -> Loaded {
    let memory = memory(guest.ram);
    let entry = guest.load(&memory, &mut || Ok(())).unwrap();
    Loaded { memory, entry }
}

/// The message of the error with which `guest` is refused. Nothing may have been written by then.
pub fn refusal(guest: &LinuxGuest, memory: &GuestMemoryMmap) -> String {
    let Err(Error::Invalid(message)) = guest.load(memory, &mut || Ok(())) else {
        panic!("it was loaded, or refused with another error");
    };
    let mut low = vec![0; 2 * MIB as usize];
    memory.read_slice(&mut low, GuestAddress(0)).unwrap();
    assert!(
        low.iter().all(|byte| *byte == 0),
        "something was written before: {message}"
    );
    message
}

impl Loaded {
    pub fn bytes(&self, gpa: u64, size: usize) -> Vec<u8> {
        let mut bytes = vec![0; size];
        self.memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    pub fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes(gpa, 8).try_into().unwrap())
    }

    pub fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.bytes(gpa, 4).try_into().unwrap())
    }

    /// A field of the boot parameters.
    pub fn parameter(&self, offset: usize) -> u32 {
        self.u32(self.entry.rsi + offset as u64)
    }

    /// The memory map, as start, end and type.
    pub fn e820(&self) -> Vec<(u64, u64, u32)> {
        let count = self.bytes(self.entry.rsi + 0x1e8, 1)[0];
        let entries = (0..u64::from(count)).map(|i| self.entry.rsi + 0x2d0 + 20 * i);
        entries
            .map(|at| (self.u64(at), self.u64(at) + self.u64(at + 8), self.u32(at + 16)))
            .collect()
    }

    /// The gpa that the page tables map `address` to, without the bits of `mask`, and whether all of these were set
    /// there.
    pub fn walk(&self, address: u64, mask: u64) -> (u64, bool) {
        let mut table = self.entry.cr3;
        for level in (1..4).rev() {
            assert_eq!(table & mask, mask, "a table that is not private");
            let index = address >> (12 + 9 * level) & 0x1ff;
            let entry = self.u64((table & !mask & !0xfff) + 8 * index);
            assert_eq!(entry & 0b11, 0b11, "present and writable: {address:#x}");
            if entry & 1 << 7 != 0 {
                let offset = (1_u64 << (12 + 9 * level)) - 1;
                return ((entry & !mask & !offset) | (address & offset), entry & mask == mask);
            }
            table = entry & !0xfff;
        }
        panic!("{address:#x} is mapped by a page of 4 KiB");
    }
}
