//! Decoding of kvm_run: against the kernel's layout, written out here in plain numbers, and with any bytes at all.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use pagegate_core::errno::Errno;
use pagegate_core::hypervisor::exit::{Exit, Hypercall, Io, MEMORY_FAULT, MemoryFault, Mmio, SENTINEL, START, decode};
use proptest::collection::vec;
use proptest::prelude::*;

mod model;

use model::*;

/// Fewer under Miri, where each takes some 1,000 times as long.
const CASES: u32 = if cfg!(miri) { 16 } else { 1024 };
const KNOWN: [u32; 12] = [
    RDMSR,
    WRMSR,
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

    let msr = [1, u64::from(0xc001_0131_u32) << 32 | 4, 0x1234_5678_9abc_def0];
    assert_eq!(
        KvmRun::new(RDMSR).words(&msr).decode(0),
        Exit::ReadMsr { index: 0xc001_0131 }
    );
    let write = Exit::WriteMsr {
        index: 0xc001_0131,
        data: msr[2],
    };
    assert_eq!(KvmRun::new(WRMSR).words(&msr).decode(0), write);

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
fn only_io_mmio_hypercalls_and_msrs_await_a_reply() {
    for reason in KNOWN {
        let exit = io_page(0, 1, 0x80, 1, PAGE as u64)
            .set(EXIT_REASON, &reason.to_le_bytes())
            .clone();
        let exit = match reason {
            MMIO => KvmRun::new(MMIO).words(&[0, 0, 4]).decode(0),
            _ => exit.decode(0),
        };
        assert_ne!(exit, Exit::Unknown { reason });
        assert_eq!(
            exit.awaits_reply(),
            [IO, MMIO, HYPERCALL, RDMSR, WRMSR].contains(&reason),
            "{exit:?}"
        );
    }
    let page = memory_fault_page(0, 0, 4096);
    for errno in [libc::EFAULT, libc::EHWPOISON, libc::EINTR] {
        assert!(!page.decode(errno).awaits_reply());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

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
