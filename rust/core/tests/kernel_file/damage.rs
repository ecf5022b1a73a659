//! Damaged files: whatever is changed, nothing panics or takes for ever.

use pagegate_core::boot::kernel_file::KernelFile;
use pagegate_core::boot::kernel_file::payload::vmlinux;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::compressed;
use crate::elf::{EM_X86_64, ET_EXEC, STB_GLOBAL, STT_FUNC, Symbol, TEXT, elf, symbols_of, with_symbols};
use crate::image::bzimage_of;
use crate::stripped::{layouts, symbols, vmlinux as stripped};

/// Reads as much of the file as it allows.
fn read(bytes: Vec<u8>) {
    let Ok(kernel) = KernelFile::parse(bytes) else { return };
    assert!(kernel.version().is_none_or(|version| version.is_ascii()));
    let Ok(vmlinux) = vmlinux(&kernel, &mut || Ok(())) else {
        return;
    };
    let Ok(symbols) = symbols_of(&vmlinux) else { return };
    for address in [0, TEXT, TEXT + 0x123, u64::MAX] {
        if let Some((name, offset)) = symbols.find(address) {
            assert!(!name.is_empty() && offset <= address);
        }
        assert!(symbols.code(address, 7).is_none_or(|code| code.len() == 7));
    }
}

/// Where the first program header has its offset, address, physical address and size in the file.
const OFFSET: usize = 64 + 8;
const PROGRAM_HEADER: usize = 56;

#[test]
fn segments_that_are_the_whole_file_again_and_again() {
    let mut file = elf(ET_EXEC, EM_X86_64, &vec![(TEXT, &b"code"[..]); 1000]);
    let size = file.len() as u64;
    for number in 0..1000 {
        let at = OFFSET + number * PROGRAM_HEADER;
        file[at..at + 8].fill(0);
        file[at + 24..at + 32].copy_from_slice(&size.to_le_bytes());
    }
    let error = symbols_of(&file).unwrap_err();
    assert!(error.contains("overlap in the file"), "{error}");
    assert!(KernelFile::parse(file).is_err());
}

fn change(mut bytes: Vec<u8>, changes: &[(Index, u8)], cut: Option<Index>) -> Vec<u8> {
    for (at, value) in changes {
        let at = at.index(bytes.len());
        bytes[at] = *value;
    }
    if let Some(cut) = cut {
        bytes.truncate(cut.index(bytes.len()));
    }
    bytes
}

fn changes(most: usize) -> impl Strategy<Value = Vec<(Index, u8)>> {
    vec((any::<Index>(), any::<u8>()), 0..most)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn of_any_bytes(bytes in vec(any::<u8>(), 0..2000), image in any::<bool>()) {
        let mut bytes = bytes;
        if image && bytes.len() > 518 {
            bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
            bytes[0x202..0x206].copy_from_slice(b"HdrS");
        }
        read(bytes);
    }

    #[test]
    fn of_a_bzimage(format in 0_usize..6, changes in changes(4), cut in any::<Option<Index>>()) {
        let (_, compressed) = compressed::all().swap_remove(format);
        read(change(bzimage_of(&compressed, compressed::plain().len() as u32), &changes, cut));
    }

    #[test]
    fn of_a_compressed_kernel(format in 0_usize..6, changes in changes(12), cut in any::<Option<Index>>()) {
        let (_, compressed) = compressed::all().swap_remove(format);
        // What says the format, and for which gzip's size is needed, stays.
        let (magic, rest) = compressed.split_at(6);
        let rest = change(rest.to_vec(), &changes, cut);
        let compressed = [magic, &rest].concat();
        read(bzimage_of(&compressed, compressed::plain().len() as u32));
    }

    #[test]
    fn of_a_symbol_table(changes in changes(8), cut in any::<Option<Index>>()) {
        let symbols = ["_text", "_etext", "panic"].map(|name| Symbol {
            name,
            address: TEXT + name.len() as u64,
            kind: STT_FUNC,
            binding: STB_GLOBAL,
        });
        read(change(with_symbols(&[(TEXT, &[0x90; 64])], &symbols), &changes, cut));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn of_kallsyms(order in 0_usize..24, changes in changes(6), cut in any::<Option<Index>>()) {
        read(change(stripped(&symbols(400), layouts()[order]), &changes, cut));
    }
}
