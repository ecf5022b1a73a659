//! What a file is that was given as a kernel and is none, and what to do about it.

/// Where the Image files of arm64 and RISC-V have their magic number, which may follow "MZ" at the start.
const IMAGE_MAGIC: usize = 0x38;
/// Where an EFI program that unpacks such an Image says so.
const ZBOOT_MAGIC: usize = 4;

/// The end of each refusal.
pub(super) const BRING: &str = "use a bzImage (a file vmlinuz-*) or an ELF vmlinux for x86-64";

/// Says what `bytes` are, which are neither a bzImage nor an ELF file.
pub(super) fn describe(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return format!("the kernel file is empty; {BRING}");
    }
    let starts = |magic: &[u8]| bytes.starts_with(magic);
    let has = |at: usize, magic: &[u8]| bytes.get(at..).is_some_and(|rest| rest.starts_with(magic));

    if has(IMAGE_MAGIC, b"ARM\x64") {
        return format!("the file is a kernel for arm64 (an Image); {BRING}");
    }
    if has(IMAGE_MAGIC, b"RSC\x05") {
        return format!("the file is a kernel for RISC-V (an Image); {BRING}");
    }
    if starts(b"MZ") && has(ZBOOT_MAGIC, b"zimg") {
        return format!("the file is a kernel for another processor (an EFI zboot image); {BRING}");
    }
    if starts(b"MZ") {
        return format!(
            "the file is an EFI or Windows program (PE), and no bzImage; {BRING}. The kernel of a unified kernel \
             image is its section .linux (objcopy -O binary --only-section=.linux)"
        );
    }
    if starts(b"070701") || starts(b"070702") || starts(b"070707") || starts(b"\xc7\x71") {
        return format!(
            "the file is an initrd (a cpio archive), not a kernel; {BRING}, and give this file as the initrd"
        );
    }
    match compression(bytes) {
        Some(name) => format!(
            "the file is compressed with {name}, so it is an initrd or a kernel that has to be decompressed first; \
             {BRING}"
        ),
        None => {
            format!("the file is not a kernel that is known: it has neither a boot sector nor an ELF header; {BRING}")
        }
    }
}

fn compression(bytes: &[u8]) -> Option<&'static str> {
    let known: [(&[u8], &str); 9] = [
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\x5d\x00\x00", "lzma"),
        (b"\xfd7zXZ\x00", "xz"),
        (b"\x89LZO", "lzo"),
        (b"\x02\x21\x4c\x18", "lz4"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\x03\x04", "zip"),
    ];
    known
        .iter()
        .find(|(magic, _)| bytes.starts_with(magic))
        .map(|&(_, name)| name)
}
