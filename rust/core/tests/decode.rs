//! Decoding of kvm_run: against the kernel's layout, written out here in plain numbers, and with any bytes at all.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use pagegate_core::errno::Errno;
use pagegate_core::hypervisor::exit::{Exit, Hypercall, Io, MEMORY_FAULT, MemoryFault, Mmio, SENTINEL, START, decode};
use proptest::collection::vec;
use proptest::prelude::*;

const IO: u32 = 2;
const HYPERCALL: u32 = 3;
const HLT: u32 = 5;
const MMIO: u32 = 6;
const SHUTDOWN: u32 = 8;
const FAIL_ENTRY: u32 = 9;
const INTR: u32 = 10;
const SET_TPR: u32 = 11;
const INTERNAL_ERROR: u32 = 17;
const SYSTEM_EVENT: u32 = 24;
const KNOWN: [u32; 10] = [
    IO,
    HYPERCALL,
    HLT,
    MMIO,
    SHUTDOWN,
    FAIL_ENTRY,
    INTR,
    SET_TPR,
    INTERNAL_ERROR,
    SYSTEM_EVENT,
];

/// Offsets in `struct kvm_run`: `exit_reason`, and the union that all exits share.
const EXIT_REASON: usize = 8;
const UNION: usize = 32;
const PAGE: usize = 4096;

/// The mapping of `struct kvm_run`; [`decode`] gets what follows the first [`START`] bytes.
#[derive(Clone)]
struct KvmRun(Vec<u8>);

impl KvmRun {
    fn new(reason: u32) -> Self {
        // Not zero, so that a field read at a wrong offset shows.
        let mut page = Self((0..2 * PAGE).map(|i| (i % 251) as u8).collect());
        page.set(EXIT_REASON, &reason.to_le_bytes());
        page
    }

    fn set(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn words(&mut self, words: &[u64]) -> &mut Self {
        for (i, word) in words.iter().enumerate() {
            self.set(UNION + 8 * i, &word.to_le_bytes());
        }
        self
    }

    fn decode(&self, errno: i32) -> Exit {
        let result = if errno == 0 { Ok(()) } else { Err(Errno(errno)) };
        decode(result, &self.0[START..])
    }
}

fn memory_fault_page(flags: u64, gpa: u64, size: u64) -> KvmRun {
    KvmRun::new(MEMORY_FAULT).words(&[flags, gpa, size]).clone()
}

fn io_page(direction: u8, size: u8, port: u16, count: u32, data: u64) -> KvmRun {
    let mut page = KvmRun::new(IO);
    page.set(UNION, &[direction, size])
        .set(UNION + 2, &port.to_le_bytes())
        .set(UNION + 4, &count.to_le_bytes())
        .set(UNION + 8, &data.to_le_bytes());
    page
}

/// Any errno: those with a meaning of their own often, all others too.
fn errnos() -> impl Strategy<Value = i32> {
    prop_oneof![
        3 => prop::sample::select(vec![
            libc::EINTR, libc::EAGAIN, libc::ENOMEM, libc::EFAULT, libc::EHWPOISON, libc::EINVAL, libc::EIO,
        ]),
        1 => any::<i32>(),
    ]
}

fn reasons() -> impl Strategy<Value = u32> {
    let known: Vec<u32> = KNOWN.into_iter().chain([MEMORY_FAULT, SENTINEL, 0]).collect();
    prop_oneof![8 => prop::sample::select(known), 1 => 0..64_u32, 1 => any::<u32>()]
}

/// Bytes that begin with a plausible reason.
fn pages() -> impl Strategy<Value = Vec<u8>> {
    // Mostly numbers that are valid as a size, a count or a direction.
    let small = |byte: &mut u8| *byte = [0, 0, 1, 2, 4, 8, 9, *byte][usize::from(*byte >> 5)];
    (reasons(), prop_oneof![0..120_usize, 0..2 * PAGE], any::<[u8; 64]>()).prop_map(move |(reason, len, bytes)| {
        let mut page = bytes.to_vec();
        page.iter_mut().for_each(small);
        page[..4].copy_from_slice(&reason.to_le_bytes());
        page.resize(len, 0);
        page
    })
}

/// Little-endian bytes as a number, `None` where the page ends before.
fn number(page: &[u8], at: usize, len: usize) -> Option<u128> {
    (at - START + len <= page.len())
        .then(|| (0..len).fold(0, |sum, i| sum + (u128::from(page[at - START + i]) << (8 * i))))
}

/// What decode should return, computed another way.
fn expected(errno: i32, page: &[u8]) -> Exit {
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
            let data = number(page, UNION + 8, 8)?;
            let inside = data >= START as u128 && data - START as u128 + size * count <= page.len() as u128;
            ([1, 2, 4].contains(&size) && count > 0 && inside).then(|| {
                Exit::Io(Io {
                    port: number(page, UNION + 2, 2).unwrap() as u16,
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

#[test]
fn the_errno_decides_before_the_exit_reason() {
    let fault = MemoryFault {
        flags: 1 << 3,
        gpa: 0x7000,
        size: 4096,
    };
    let page = memory_fault_page(1 << 3, 0x7000, 4096);
    assert_eq!(page.decode(libc::EINTR), Exit::Interrupted);
    assert_eq!(page.decode(libc::EAGAIN), Exit::TryAgain);
    assert_eq!(page.decode(libc::ENOMEM), Exit::OutOfMemory);
    assert_eq!(page.decode(libc::EFAULT), Exit::MemoryFault(fault));
    assert_eq!(page.decode(libc::EHWPOISON), Exit::Poison(fault));
    assert_eq!(page.decode(libc::EIO), Exit::Failed(Errno(libc::EIO)));
    assert_eq!(page.decode(libc::EINVAL), Exit::Failed(Errno(libc::EINVAL)));
    // Where KVM_RUN succeeded, asynchronous page-ready handling or a KVM_PRE_FAULT_MEMORY left it there.
    assert_eq!(page.decode(0), Exit::Unknown { reason: MEMORY_FAULT });
}

#[test]
fn an_efault_without_a_memory_fault_is_bad_backing() {
    for reason in KNOWN.into_iter().chain([0, SENTINEL, MEMORY_FAULT + 1]) {
        let page = KvmRun::new(reason);
        assert_eq!(page.decode(libc::EFAULT), Exit::BadBacking, "reason {reason}");
        assert_eq!(page.decode(libc::EHWPOISON), Exit::Failed(Errno(libc::EHWPOISON)));
    }
}

#[test]
fn each_exit_is_read_at_its_offsets() {
    assert_eq!(KvmRun::new(HLT).decode(0), Exit::Halt);
    assert_eq!(KvmRun::new(SHUTDOWN).decode(0), Exit::Shutdown);
    assert_eq!(KvmRun::new(INTR).decode(0), Exit::Interrupted);
    assert_eq!(KvmRun::new(SENTINEL).decode(0), Exit::Unknown { reason: SENTINEL });
    assert_eq!(KvmRun::new(0).decode(0), Exit::Unknown { reason: 0 });

    let words = [12, 0xffff_ffff_ffff_f000, 1 << 52, 0x10, 0x55];
    let call = Hypercall {
        nr: 12,
        args: [words[1], words[2], words[3]],
    };
    assert_eq!(KvmRun::new(HYPERCALL).words(&words).decode(0), Exit::Hypercall(call));

    let error = 0xffff_ffff_0000_0001;
    let suberror = 1;
    assert_eq!(
        KvmRun::new(INTERNAL_ERROR).words(&[error]).decode(0),
        Exit::InternalError { suberror }
    );
    assert_eq!(
        KvmRun::new(SYSTEM_EVENT).words(&[error]).decode(0),
        Exit::SystemEvent { kind: 1 }
    );
    assert_eq!(
        KvmRun::new(FAIL_ENTRY).words(&[error]).decode(0),
        Exit::FailEntry { reason: error }
    );

    let data = 0x1122_3344_5566_7788_u64;
    for (write, len) in [(false, 1), (true, 2), (true, 4), (false, 8)] {
        let page = KvmRun::new(MMIO)
            .words(&[0xfec0_0000, data, u64::from(len) | u64::from(write) << 32])
            .clone();
        let mmio = Mmio {
            gpa: 0xfec0_0000,
            write,
            len,
            data: data.to_le_bytes(),
        };
        assert_eq!(page.decode(0), Exit::Mmio(mmio));
    }
    for len in [0, 9, 256, 257, u64::from(u32::MAX)] {
        let page = KvmRun::new(MMIO).words(&[0xfec0_0000, data, len]).clone();
        assert_eq!(page.decode(0), Exit::Unknown { reason: MMIO }, "len {len}");
    }
}

#[test]
fn io_whose_data_lies_outside_kvm_run_is_unknown() {
    let io = |size: u8, count: u32, at: usize| io_page(1, size, 0x3f8, count, at as u64).decode(0);
    let data = PAGE - START;
    let sane = Io {
        port: 0x3f8,
        write: true,
        size: 4,
        count: 1024,
        data,
    };
    assert_eq!(io(4, 1024, PAGE), Exit::Io(sane));
    assert_eq!(sane.len(), 4096);
    let unknown = Exit::Unknown { reason: IO };
    assert_eq!(io(4, 1025, PAGE), unknown);
    assert_eq!(io(1, 1, 2 * PAGE), unknown);
    assert_eq!(io(1, 1, usize::MAX), unknown);
    assert_eq!(io(4, u32::MAX, PAGE), unknown);
    assert_eq!(io(1, 1, START - 1), unknown);
    assert_eq!(io(1, 0, PAGE), unknown);
    assert_eq!(io(0, 1, PAGE), unknown);
    assert_eq!(io(3, 1, PAGE), unknown);
    assert_eq!(io(8, 1, PAGE), unknown);
}

#[test]
fn only_io_mmio_and_hypercalls_await_a_reply() {
    for reason in KNOWN {
        let exit = io_page(0, 1, 0x80, 1, PAGE as u64)
            .set(EXIT_REASON, &reason.to_le_bytes())
            .clone();
        let exit = match reason {
            MMIO => KvmRun::new(MMIO).words(&[0, 0, 4]).decode(0),
            _ => exit.decode(0),
        };
        assert_ne!(exit, Exit::Unknown { reason });
        assert_eq!(exit.awaits_reply(), [IO, MMIO, HYPERCALL].contains(&reason), "{exit:?}");
    }
    let page = memory_fault_page(0, 0, 4096);
    for errno in [libc::EFAULT, libc::EHWPOISON, libc::EINTR] {
        assert!(!page.decode(errno).awaits_reply());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn any_errno_and_exit_decode_as_expected(errno in prop_oneof![Just(0), errnos()], page in pages()) {
        let result = if errno == 0 { Ok(()) } else { Err(Errno(errno)) };
        prop_assert_eq!(decode(result, &page), expected(errno, &page));
    }

    #[test]
    fn any_bytes_decode_without_a_panic(errno in any::<i32>(), page in vec(any::<u8>(), 0..400)) {
        for result in [Ok(()), Err(Errno(errno))] {
            let exit = decode(result, &page);
            if let (Exit::Io(io), true) = (exit, result.is_ok()) {
                prop_assert!(io.data + io.len() <= page.len() && !io.is_empty());
            }
        }
    }

    #[test]
    fn kvm_run_is_ignored_unless_kvm_filled_it_in(
        errno in errnos(),
        page in vec(any::<u8>(), 24..200),
        other in vec(any::<u8>(), 24..200),
    ) {
        let with_sentinel = |mut page: Vec<u8>| {
            page[..4].copy_from_slice(&SENTINEL.to_le_bytes());
            decode(Err(Errno(errno)), &page)
        };
        let exit = with_sentinel(page);
        prop_assert_eq!(exit, with_sentinel(other));
        let said = matches!(
            exit,
            Exit::Interrupted | Exit::TryAgain | Exit::OutOfMemory | Exit::BadBacking | Exit::Failed(_)
        );
        prop_assert!(said, "{:?}", exit);
    }

    #[test]
    fn io_has_the_fields_of_kvm_run_and_its_data_inside(
        direction in 0..2_u8,
        size in prop::sample::select(vec![1_u8, 2, 4]),
        port in any::<u16>(),
        count in prop_oneof![0..6_u32, 1000..1100_u32, 2000..2100_u32, 4000..4100_u32, any::<u32>()],
        data in prop_oneof![0..64_u64, 4000..4200_u64, 8100..8300_u64, any::<u64>()],
    ) {
        let bytes = u128::from(size) * u128::from(count);
        let fits = data >= START as u64 && u128::from(data) + bytes <= 2 * PAGE as u128 && count > 0;
        match io_page(direction, size, port, count, data).decode(0) {
            Exit::Io(io) => {
                prop_assert!(fits);
                prop_assert_eq!((io.port, io.write, io.size, io.count), (port, direction == 1, size, count));
                prop_assert_eq!((io.data + START) as u64, data);
                prop_assert_eq!(io.len() as u128, bytes);
            }
            exit => {
                prop_assert!(!fits);
                prop_assert_eq!(exit, Exit::Unknown { reason: IO });
            }
        }
    }
}
