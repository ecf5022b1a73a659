//! The short ways against the long one, for whatever bytes there may be.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn pages() -> impl Strategy<Value = Vec<u8>> {
    let reason = prop_oneof![
        4 => Just(kvm_bindings::KVM_EXIT_IO),
        2 => Just(kvm_bindings::KVM_EXIT_HYPERCALL),
        1 => Just(SENTINEL),
        1 => any::<u32>(),
    ];
    let size = prop_oneof![4 => prop::sample::select(vec![1_u8, 2, 4]), 1 => any::<u8>()];
    let count = prop_oneof![4 => 0_u32..6, 1 => any::<u32>()];
    let start = prop_oneof![2 => 0_u64..400, 2 => 4000_u64..4200, 1 => any::<u64>()];
    let len = prop_oneof![1 => 0_usize..HEAD + 8, 4 => Just(4096 - PAGE_START)];
    (vec(any::<u8>(), 4096 - PAGE_START), reason, size, count, start, len).prop_map(
        |(mut page, reason, size, count, start, len)| {
            put(&mut page, offset::EXIT_REASON, &reason.to_le_bytes());
            put(&mut page, UNION + 1, &[size]);
            put(&mut page, UNION + 4, &count.to_le_bytes());
            put(&mut page, UNION + 8, &start.to_le_bytes());
            page.truncate(len);
            page
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_short_ways_find_what_the_long_one_finds(mut page in pages()) {
        let exit = decode(Ok(()), &page);
        let whole = page.len() >= HEAD;
        let copy = page.clone();
        let short = port_io(&copy).map(io);
        match (short, exit) {
            (Some(io), Exit::Io(found)) => {
                prop_assert_eq!(io, found);
                let expected = copy[io.data..io.data + io.len()].to_vec();
                prop_assert_eq!(io_data(&mut page, &io).unwrap(), expected);
            }
            (Some(io), found) => {
                prop_assert_eq!(found, Exit::Unknown { reason: kvm_bindings::KVM_EXIT_IO });
                prop_assert_eq!(io_data(&mut page, &io), None);
            }
            (None, found) => prop_assert!(!whole || !matches!(found, Exit::Io(_))),
        }
        match (hypercall(&copy), exit) {
            (Some(call), found) => prop_assert_eq!(found, Exit::Hypercall(call)),
            (None, found) => prop_assert!(!whole || !matches!(found, Exit::Hypercall(_))),
        }
    }
}
