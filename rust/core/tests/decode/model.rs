//! What [`decode`](pagegate_core::hypervisor::exit::decode) should return, computed another way: from the kernel's layout,
//! written out here in plain numbers.

use pagegate_core::errno::Errno;
use pagegate_core::hypervisor::exit::{Exit, Hypercall, Io, MemoryFault, Mmio, SENTINEL, START};

pub const IO: u32 = 2;
pub const HYPERCALL: u32 = 3;
pub const HLT: u32 = 5;
pub const MMIO: u32 = 6;
pub const SHUTDOWN: u32 = 8;
pub const FAIL_ENTRY: u32 = 9;
pub const INTR: u32 = 10;
pub const SET_TPR: u32 = 11;
pub const INTERNAL_ERROR: u32 = 17;
pub const SYSTEM_EVENT: u32 = 24;
pub const RDMSR: u32 = 29;
pub const WRMSR: u32 = 30;

/// Offsets in `struct kvm_run`: `exit_reason`, and the union that all exits share.
pub const EXIT_REASON: usize = 8;
pub const UNION: usize = 32;

/// Little-endian bytes as a number, `None` where the page ends before.
fn number(page: &[u8], at: usize, len: usize) -> Option<u128> {
    (at - START + len <= page.len())
        .then(|| (0..len).fold(0, |sum, i| sum + (u128::from(page[at - START + i]) << (8 * i))))
}

/// What decode should return.
pub fn expected(errno: i32, page: &[u8]) -> Exit {
    let reason = number(page, EXIT_REASON, 4).map_or(SENTINEL, |reason| reason as u32);
    let word = |at: usize| number(page, UNION + at, 8).map(|word| word as u64);
    let fault = || {
        Some(MemoryFault {
            flags: word(0)?,
            gpa: word(8)?,
            size: word(16)?,
        })
    };
    let dispatched = || match reason {
        HLT => Some(Exit::Halt),
        SHUTDOWN => Some(Exit::Shutdown),
        INTR => Some(Exit::Interrupted),
        SET_TPR => Some(Exit::SetTpr),
        INTERNAL_ERROR => number(page, UNION, 4).map(|error| Exit::InternalError { suberror: error as u32 }),
        SYSTEM_EVENT => number(page, UNION, 4).map(|kind| Exit::SystemEvent { kind: kind as u32 }),
        FAIL_ENTRY => word(0).map(|reason| Exit::FailEntry { reason }),
        RDMSR => number(page, UNION + 12, 4).map(|index| Exit::ReadMsr { index: index as u32 }),
        WRMSR => number(page, UNION + 12, 4).and_then(|index| {
            let data = word(16)?;
            let index = index as u32;
            Some(Exit::WriteMsr { index, data })
        }),
        HYPERCALL => Some(Exit::Hypercall(Hypercall {
            nr: word(0)?,
            args: [word(8)?, word(16)?, word(24)?],
        })),
        MMIO => {
            let len = number(page, UNION + 16, 4)?;
            let write = number(page, UNION + 20, 1)? != 0;
            let data = word(8)?.to_le_bytes();
            (1..=8).contains(&len).then_some(Exit::Mmio(Mmio {
                gpa: word(0)?,
                write,
                len: len as u8,
                data,
            }))
        }
        IO => {
            let (size, count) = (number(page, UNION + 1, 1)?, number(page, UNION + 4, 4)?);
            let (port, data) = (number(page, UNION + 2, 2)?, number(page, UNION + 8, 8)?);
            let inside = data >= START as u128 && data - START as u128 + size * count <= page.len() as u128;
            ([1, 2, 4].contains(&size) && count > 0 && inside).then(|| {
                Exit::Io(Io {
                    port: port as u16,
                    write: number(page, UNION, 1) == Some(1),
                    size: size as u8,
                    count: count as u32,
                    data: data as usize - START,
                })
            })
        }
        _ => None,
    };
    match errno {
        0 => dispatched().unwrap_or(Exit::Unknown { reason }),
        libc::EINTR => Exit::Interrupted,
        libc::EAGAIN => Exit::TryAgain,
        libc::ENOMEM => Exit::OutOfMemory,
        libc::EFAULT if reason == 39 => fault().map_or(Exit::BadBacking, Exit::MemoryFault),
        libc::EHWPOISON if reason == 39 => fault().map_or(Exit::Failed(Errno(errno)), Exit::Poison),
        libc::EFAULT => Exit::BadBacking,
        _ => Exit::Failed(Errno(errno)),
    }
}
