//! Made-up ELF files, and what is read of them.

use pagegate_core::boot::kernel_file::symbols::Symbols;

pub const TEXT: u64 = 0xffff_ffff_8100_0000;

pub const ET_REL: u16 = 1;
pub const ET_EXEC: u16 = 2;
pub const ET_DYN: u16 = 3;
pub const EM_X86_64: u16 = 62;
pub const EM_AARCH64: u16 = 183;
pub const EM_S390: u16 = 22;

pub const STT_NOTYPE: u8 = 0;
pub const STT_OBJECT: u8 = 1;
pub const STT_FUNC: u8 = 2;
pub const STT_FILE: u8 = 4;
pub const STB_LOCAL: u8 = 0;
pub const STB_GLOBAL: u8 = 1;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const SECTION_HEADER: usize = 64;
const PAGE: usize = 4096;

/// A symbol of the table.
#[derive(Clone, Debug)]
pub struct Symbol {
    pub name: &'static str,
    pub address: u64,
    pub kind: u8,
    pub binding: u8,
}

/// A file with these segments, each with its virtual address, and no section.
pub fn elf(kind: u16, machine: u16, segments: &[(u64, &[u8])]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(kind.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for word in [0x100_0000, HEADER as u64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [HEADER, PROGRAM_HEADER, segments.len(), SECTION_HEADER, 0, 0] {
        file.extend((half as u16).to_le_bytes());
    }
    let mut at = PAGE as u64;
    for (address, bytes) in segments {
        let length = bytes.len() as u64;
        file.extend(1_u32.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for word in [at, *address, *address & 0x7fff_ffff, length, length, PAGE as u64] {
            file.extend(word.to_le_bytes());
        }
        at = (at + length).next_multiple_of(PAGE as u64);
    }
    for (_, bytes) in segments {
        file.resize(file.len().next_multiple_of(PAGE), 0);
        file.extend(*bytes);
    }
    file
}

/// A vmlinux with a symbol table.
pub fn with_symbols(segments: &[(u64, &[u8])], symbols: &[Symbol]) -> Vec<u8> {
    let mut strings = vec![0];
    let mut table = vec![0; 24];
    for symbol in symbols {
        table.extend((strings.len() as u32).to_le_bytes());
        table.extend([symbol.binding << 4 | symbol.kind, 0]);
        table.extend(1_u16.to_le_bytes());
        table.extend(symbol.address.to_le_bytes());
        table.extend(0_u64.to_le_bytes());
        strings.extend(symbol.name.bytes());
        strings.push(0);
    }
    let mut file = elf(ET_EXEC, EM_X86_64, segments);
    let table_at = file.len().next_multiple_of(8);
    file.resize(table_at, 0);
    file.extend(&table);
    let strings_at = file.len();
    file.extend(&strings);
    let headers_at = file.len().next_multiple_of(8);
    file.resize(headers_at, 0);
    let (symtab, strtab, none) = (2_u32, 3_u32, 0_u32);
    for (kind, at, length, link, entry) in [
        (none, 0, 0, 0, 0),
        (symtab, table_at, table.len(), 2_u32, 24),
        (strtab, strings_at, strings.len(), 0, 0),
    ] {
        file.extend(0_u32.to_le_bytes());
        file.extend(kind.to_le_bytes());
        for word in [0, 0, at, length] {
            file.extend((word as u64).to_le_bytes());
        }
        file.extend(link.to_le_bytes());
        file.extend(1_u32.to_le_bytes());
        for word in [8_u64, entry] {
            file.extend(word.to_le_bytes());
        }
    }
    file[0x28..0x30].copy_from_slice(&(headers_at as u64).to_le_bytes());
    file[0x3c..0x3e].copy_from_slice(&3_u16.to_le_bytes());
    file[0x3e..0x40].copy_from_slice(&2_u16.to_le_bytes());
    file
}

/// The symbols of a vmlinux, or in words why there are none.
pub fn symbols_of(vmlinux: &[u8]) -> Result<Symbols, String> {
    Symbols::read(vmlinux, &mut || Ok(())).map_err(|error| error.to_string())
}
