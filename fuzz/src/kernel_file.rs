//! Files of Linux kernels: their headers, the payload decompressed, the symbols.

use pagegate_core::boot::kernel_file::KernelFile;
use pagegate_core::boot::kernel_file::payload::vmlinux;
use pagegate_core::boot::kernel_file::symbols::Symbols;

/// A file.
pub fn run(data: &[u8]) -> bool {
    let Ok(kernel) = KernelFile::parse(data.to_vec()) else {
        return false;
    };
    assert!(kernel.version().is_none_or(|version| version.is_ascii()));
    let Ok(vmlinux) = vmlinux(&kernel, &mut || Ok(())) else {
        return false;
    };
    let Ok(symbols) = Symbols::read(&vmlinux, &mut || Ok(())) else {
        return false;
    };
    for name in ["_text", "_stext", "_etext", "_sinittext", "_einittext"] {
        let Some(address) = symbols.address(name) else {
            continue;
        };
        for address in [address.wrapping_sub(1), address, address.wrapping_add(1)] {
            if let Some((found, offset)) = symbols.find(address) {
                assert!(symbols.address(found).is_some_and(|start| start <= address - offset));
            }
            assert!(symbols.code(address, 7).is_none_or(|code| code.len() == 7));
        }
        let slide = symbols.slide(&[(name, address.wrapping_add(0x20_0000))]);
        assert!(slide.is_none_or(|slide| slide == 0x20_0000));
    }
    true
}
