//! Kernels of distributions: the files vmlinuz-* in the folder that PAGEGATE_TEST_GUESTS names, which are those of
//! Debian's packages linux-image-*-cloud-amd64.

use std::path::{Path, PathBuf};

use pagegate_core::boot::kernel_file::KernelFile;
use pagegate_core::boot::kernel_file::payload::vmlinux;
use pagegate_core::boot::kernel_file::symbols::Symbols;

use crate::elf::symbols_of;

const TEXT: u64 = 0xffff_ffff_8100_0000;

/// Calls `check` with each kernel's path, or says why there is none.
fn each(check: impl Fn(&Path, &KernelFile, &Symbols)) {
    let Some(folder) = std::env::var_os("PAGEGATE_TEST_GUESTS") else {
        eprintln!("skipped: PAGEGATE_TEST_GUESTS names no folder with kernels");
        return;
    };
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_kernel = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("vmlinuz-");
    let kernels: Vec<PathBuf> = entries.filter(is_kernel).collect();
    assert!(!kernels.is_empty(), "PAGEGATE_TEST_GUESTS has no vmlinuz-*");
    for path in kernels {
        let kernel = KernelFile::parse(std::fs::read(&path).unwrap()).unwrap();
        let symbols = symbols_of(&vmlinux(&kernel, &mut || Ok(())).unwrap()).unwrap();
        check(&path, &kernel, &symbols);
    }
}

#[test]
fn the_version_is_in_the_name() {
    each(|path, kernel, _| {
        let version = kernel.version().unwrap().split(' ').next().unwrap();
        assert_eq!(
            path.file_name().unwrap().to_string_lossy(),
            format!("vmlinuz-{version}")
        );
    });
}

#[test]
fn well_known_symbols() {
    each(|path, _, symbols| {
        assert!(symbols.count() > 50_000, "{}", path.display());
        assert_eq!(symbols.address("_text"), Some(TEXT));
        for name in [
            "start_kernel",
            "panic",
            "clear_bss",
            "set_memory_decrypted",
            "entry_SYSCALL_64",
        ] {
            let address = symbols.address(name).unwrap();
            assert_eq!(symbols.find(address + 1), Some((name, 1)), "{}", path.display());
            assert_eq!(symbols.slide(&[(name, address + (34 << 21))]), Some(34 << 21));
        }
        for name in ["idt_table", "bringup_idt_table", "__start_bss_decrypted"] {
            let address = symbols.address(name).unwrap();
            assert_eq!(address % 4096, 0, "{name} in {}", path.display());
            assert_eq!(symbols.find(address), None, "{name} is no code");
        }
        let end = symbols.address("_etext").unwrap();
        assert_eq!(symbols.find(end), None);
        assert!(symbols.find(end - 1).is_some());
    });
}

/// The code at a symbol is that function's: names, addresses and bytes belong together.
#[test]
fn code_is_where_its_name_is() {
    each(|path, _, symbols| {
        // endbr64, in kernels with CONFIG_X86_KERNEL_IBT.
        let body = |name: &str| {
            let address = symbols.address(name).unwrap();
            let endbr64 = symbols.code(address, 4) == Some(&[0xf3, 0x0f, 0x1e, 0xfa]);
            address + if endbr64 { 4 } else { 0 }
        };
        let swapgs = [0x0f, 0x01, 0xf8];
        assert_eq!(
            symbols.code(body("entry_SYSCALL_64"), 3),
            Some(&swapgs[..]),
            "{}",
            path.display()
        );
        for name in ["panic", "set_memory_decrypted", "vfs_read", "schedule_timeout"] {
            let call = body(name);
            let code = symbols.code(call, 5).unwrap();
            assert_eq!(
                code[0],
                0xe8,
                "{name} in {} begins with a call of ftrace",
                path.display()
            );
            let distance = i32::from_le_bytes(code[1..].try_into().unwrap());
            let target = (call + 5).wrapping_add_signed(i64::from(distance));
            assert_eq!(
                symbols.find(target),
                Some(("__fentry__", 0)),
                "{name} in {}",
                path.display()
            );
        }
    });
}

#[test]
fn every_address_of_the_code_has_a_name() {
    each(|path, _, symbols| {
        let end = symbols.address("_etext").unwrap();
        let mut last = TEXT;
        for address in (TEXT..end).step_by(61) {
            let (name, offset) = symbols.find(address).unwrap();
            let start = address - offset;
            assert!(start >= last, "{name} in {}", path.display());
            last = start;
        }
    });
}
