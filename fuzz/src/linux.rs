//! Linux guests: a kernel, an initrd and a command line, loaded into memory.

use arbitrary::{Result, Unstructured};
use pagegate_core::boot::linux::LinuxGuest;
use pagegate_core::memory::address::{PAGE_SIZE, Range};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// What the guest is made of, and the kernel's file.
pub fn run(data: &[u8]) -> bool {
    load(Unstructured::new(data)).unwrap_or(false)
}

fn load(mut data: Unstructured<'_>) -> Result<bool> {
    let ram = [
        range(0, data.int_in_range(1..=64 << 8)?),
        range(4 << 30, data.int_in_range(1..=256)?),
    ];
    let ram = &ram[..data.int_in_range(1..=2)?];
    let initrd = vec![1; data.arbitrary::<u16>()?.into()];
    let command_line = " ".repeat(data.arbitrary::<u16>()?.into());
    let private_bit = data.int_in_range(0..=63)?;
    let vcpus = data.arbitrary::<u16>()?.into();
    let flags = data.arbitrary::<u8>()?;
    let guest = LinuxGuest {
        kernel: data.take_rest(),
        is_bzimage: flags & 1 == 0,
        initrd: (flags & 2 != 0).then_some(&initrd),
        command_line: &command_line,
        ram,
        vcpus,
        private_bit: (flags & 4 != 0).then_some(private_bit),
        pci: flags & 8 != 0,
    };
    let parts = ram
        .iter()
        .map(|range| (GuestAddress(range.gpa()), range.size() as usize));
    let memory = GuestMemoryMmap::<()>::from_ranges(&parts.collect::<Vec<_>>()).expect("host memory for the guest");
    let entry = guest.load(&memory, &mut || Ok(()));
    if let Ok(entry) = entry {
        for gpa in [entry.rip, entry.rsp - 8, entry.rsi] {
            assert!(ram[0].contains(gpa), "{entry:x?}");
        }
    }
    Ok(entry.is_ok())
}

fn range(gpa: u64, pages: u64) -> Range {
    Range::new(gpa, pages * PAGE_SIZE).expect("a valid range")
}
