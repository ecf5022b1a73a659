//! The parser of KVM_HC_MAP_GPA_RANGE, against the definition of the hypercall in arithmetic that cannot overflow.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use pagegate_core::errno::Errno;
use pagegate_core::hypervisor::exit::Hypercall;
use pagegate_core::hypervisor::hypercall::KVM_HC_MAP_GPA_RANGE;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::memory::views::{ViewBit, Views};
use pagegate_core::policy::map_gpa_range::{MapGpaRange, parse};
use proptest::prelude::*;

mod model;

use model::{Expected, expected};

/// The views of this memory, with a shared bit or without.
fn views(memory: u64, shared_bit: Option<u32>) -> Views {
    let set = State::Shared;
    Views::new(memory, None, shared_bit.map(|bit| ViewBit { bit, set }))
}

fn ask(gpa: u64, pages: u64, attributes: u64, views: &Views) -> Result<Option<MapGpaRange>, Errno> {
    let call = Hypercall {
        nr: KVM_HC_MAP_GPA_RANGE,
        args: [gpa, pages, attributes],
    };
    parse(&call, views)
}

fn check(gpa: u64, pages: u64, attributes: u64, views: &Views, shared_bit: Option<u32>) {
    let parsed = ask(gpa, pages, attributes, views);
    let wanted = expected(gpa, pages, attributes, views.size(), shared_bit);
    let case = format!("gpa {gpa:#x}, {pages:#x} pages, attributes {attributes:#x}, {views:x?}");
    match (parsed, wanted) {
        (Ok(Some(request)), Expected::Convert(gpa, size, private, page_size)) => {
            assert_eq!((request.range.gpa(), request.range.size()), (gpa, size), "{case}");
            assert_eq!(request.to == State::Private, private, "{case}");
            assert_eq!((request.page_size, request.raw), (page_size, attributes), "{case}");
        }
        (Ok(None), Expected::Nothing) => {}
        (Err(errno), Expected::Malformed) => assert_eq!(errno.0, libc::EINVAL, "{case}"),
        (parsed, wanted) => panic!("{case}: {parsed:?}, expected {wanted:x?}"),
    }
}

/// Fewer under Miri, where each takes some 1,000 times as long.
const CASES: u32 = if cfg!(miri) { 16 } else { 2000 };
const MEMORY: u64 = 64 * PAGE_SIZE;
const BIT: u32 = 40;

#[test]
fn page_counts_whose_size_in_bytes_overflows_are_refused() {
    let views = views(MEMORY, None);
    // KVM passes them on: it adds page numbers, which does not overflow. In bytes they wrap to none and to one page.
    assert_eq!(ask(0x1000, 1 << 52, 0, &views), Err(Errno(libc::EINVAL)));
    assert_eq!(ask(0x1000, (1 << 52) + 1, 0, &views), Err(Errno(libc::EINVAL)));
    assert_eq!(ask(0, u64::MAX, 0x10, &views), Err(Errno(libc::EINVAL)));
    assert_eq!(ask(0, 0, 0x10, &views), Err(Errno(libc::EINVAL)));
    let whole = ask(0, 64, 0x12, &views).unwrap().unwrap();
    assert_eq!((whole.range.size(), whole.to), (MEMORY, State::Private));
    assert_eq!(whole.page_size, 1 << 30);
}

#[test]
fn each_attribute_bit_is_parsed_as_defined() {
    let views = views(MEMORY, None);
    for bit in 0..64 {
        check(0x1000, 1, 1 << bit, &views, None);
        check(0x1000, 1, 1 << bit | 0x10, &views, None);
        for hint in 0..16 {
            check(0x1000, 1, 1 << bit | hint, &views, None);
        }
    }
}

#[test]
fn each_address_bit_is_parsed_as_defined() {
    for shared_bit in [None, Some(BIT), Some(30), Some(18)] {
        let views = views(MEMORY, shared_bit);
        for bit in 0..64 {
            for gpa in [1 << bit, 1 << bit | 0x1000, (1_u64 << bit).wrapping_sub(0x1000)] {
                for pages in [0, 1, 2, 63, 64, 65, 1 << bit] {
                    check(gpa, pages, 0x10, &views, shared_bit);
                    check(gpa, pages, 0, &views, shared_bit);
                }
            }
        }
    }
}

/// Addresses at the borders of the guest's memory and where arithmetic overflows, and near them.
fn edges(memory: u64) -> impl Strategy<Value = u64> {
    let shared = 1 << BIT;
    let edge = prop::sample::select(vec![
        0,
        PAGE_SIZE,
        memory / 2,
        memory - PAGE_SIZE,
        memory,
        shared,
        shared + memory - PAGE_SIZE,
        shared + memory,
        1 << 51,
        1 << 52,
        (1 << 52) - PAGE_SIZE,
        1 << 63,
        u64::MAX - PAGE_SIZE + 1,
    ]);
    let off = prop_oneof![
        6 => Just(0_i64),
        2 => prop::sample::select(vec![-4096_i64, 4096, 8192]),
        1 => -3_i64..3,
        1 => 1_i64..4096,
    ];
    prop_oneof![
        4 => (edge, off).prop_map(|(edge, off)| edge.wrapping_add_signed(off)),
        2 => (0..memory / PAGE_SIZE).prop_map(|page| page * PAGE_SIZE),
        1 => any::<u64>(),
    ]
}

fn counts(memory: u64) -> impl Strategy<Value = u64> {
    let pages = memory / PAGE_SIZE;
    let edge = prop::sample::select(vec![
        0,
        1,
        2,
        pages - 1,
        pages,
        pages + 1,
        (1 << 52) - pages,
        (1 << 52) - 1,
        1 << 52,
        (1 << 52) + 1,
        (1 << 52) + pages,
        u64::MAX,
    ]);
    prop_oneof![4 => edge, 4 => 0..pages + 4, 1 => any::<u64>()]
}

fn attributes() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => prop::sample::select(vec![0_u64, 1, 2, 0x10, 0x11, 0x12]),
        2 => 0..64_u64,
        1 => (0..64_u32, 0..32_u64).prop_map(|(bit, low)| 1 << bit | low),
        1 => any::<u64>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn any_request_is_parsed_as_defined(gpa in edges(MEMORY), pages in counts(MEMORY), attributes in attributes(), split in any::<bool>()) {
        let bit = split.then_some(BIT);
        check(gpa, pages, attributes, &VIEWS.with(|views| views[usize::from(split)]), bit);
    }
}

thread_local! {
    static VIEWS: [Views; 2] = [views(MEMORY, None), views(MEMORY, Some(BIT))];
}
