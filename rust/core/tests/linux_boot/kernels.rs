//! Kernels of distributions, where PAGEGATE_TEST_GUESTS names a folder that has some, as files vmlinuz-*.

use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::guest::{KERNEL_AT, MIB, RAMDISK_IMAGE, guest, load, memory, pattern, range, refusal};

fn kernels() -> Vec<PathBuf> {
    let Some(folder) = env::var_os("PAGEGATE_TEST_GUESTS") else {
        println!("skipped: PAGEGATE_TEST_GUESTS names no folder with kernels (vmlinuz-*)");
        return Vec::new();
    };
    let is_kernel = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-"))
    };
    let files = fs::read_dir(Path::new(&folder)).unwrap();
    let kernels: Vec<_> = files.map(|file| file.unwrap().path()).filter(is_kernel).collect();
    assert!(!kernels.is_empty(), "{folder:?} has no vmlinuz-*");
    kernels
}

#[test]
fn a_distributions_kernel_is_loaded() {
    for path in kernels() {
        let kernel = fs::read(&path).unwrap();
        let initrd = pattern(5 * MIB as usize);
        let ram = [range(0, 256 * MIB)];
        let mut guest = guest(&kernel, &ram);
        guest.initrd = Some(&initrd);
        let loaded = load(&guest);
        assert_eq!(loaded.entry.rip, KERNEL_AT + 0x200, "{path:?}");
        let setup = (usize::from(kernel[0x1f1]) + 1) * 512;
        assert_eq!(
            loaded.bytes(KERNEL_AT, kernel.len() - setup),
            kernel[setup..],
            "{path:?}"
        );
        assert_eq!(u64::from(loaded.parameter(RAMDISK_IMAGE)), 251 * MIB);
    }
}

#[test]
fn a_distributions_kernel_says_how_much_memory_it_needs() {
    for path in kernels() {
        let kernel = fs::read(&path).unwrap();
        let ram = [range(0, 48 * MIB)];
        let message = refusal(&guest(&kernel, &ram), &memory(&ram));
        assert!(message.contains("has 48 MiB"), "{path:?}: {message}");
    }
}
