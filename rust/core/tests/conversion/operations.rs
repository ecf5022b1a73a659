//! Random sequences of conversions, reads and writes, with calls that fail, against the model.

use pagegate_core::hypervisor::fake::Injection;
use pagegate_core::hypervisor::host::EnforcementMode;
use pagegate_core::memory::address::{PAGE_SIZE, Range, State};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::common::BIT;
use crate::model::Model;
use crate::setup::{ALL_CALLS, Setup, pages};

#[derive(Clone, Debug)]
enum Op {
    Convert {
        range: Range,
        /// Whether the start is named by its shared view.
        by_shared_view: bool,
        to: State,
        /// Whether the old side is kept.
        keep: bool,
        injection: Option<Injection>,
    },
    Write {
        at: u64,
        len: u64,
        byte: u8,
    },
    Read {
        at: u64,
        len: u64,
    },
}

fn injections() -> impl Strategy<Value = Injection> {
    let errno = prop::sample::select(vec![libc::ENOMEM, libc::EINVAL, libc::EAGAIN, libc::EIO]);
    let after = prop_oneof![3 => Just(0_u64), 2 => 1..4_u64];
    (
        prop::sample::select(&ALL_CALLS[..]),
        after,
        errno,
        any::<bool>(),
        prop::bool::weighted(0.15),
    )
        .prop_map(|(call, after, errno, half_done, forever)| Injection {
            call,
            after,
            errno,
            half_done,
            forever,
        })
}

fn ranges(memory: u64) -> impl Strategy<Value = Range> {
    (0..memory).prop_flat_map(move |first| {
        let longest = memory - first;
        let count = prop_oneof![3 => 1..=longest.min(5), 2 => 1..=longest, 1 => Just(longest)];
        count.prop_map(move |count| pages(first, count))
    })
}

fn sides() -> impl Strategy<Value = State> {
    prop::sample::select(vec![State::Private, State::Shared])
}

fn ops(memory: u64) -> impl Strategy<Value = Op> {
    let bytes = move || (0..memory * PAGE_SIZE, 1..4 * PAGE_SIZE);
    let convert = (
        ranges(memory),
        any::<bool>(),
        sides(),
        prop::bool::weighted(0.2),
        prop::option::weighted(0.3, injections()),
    );
    prop_oneof![
        5 => convert.prop_map(|(range, by_shared_view, to, keep, injection)| {
            Op::Convert { range, by_shared_view, to, keep, injection }
        }),
        3 => (bytes(), 1..=255_u8).prop_map(|((at, len), byte)| Op::Write { at, len, byte }),
        2 => bytes().prop_map(|(at, len)| Op::Read { at, len }),
    ]
}

fn setups() -> impl Strategy<Value = Setup> {
    let mode = prop::sample::select(EnforcementMode::ALL.to_vec());
    // The larger sizes take more than one KVM_SET_MEMORY_ATTRIBUTES.
    let pages = prop_oneof![9 => 3..40_u64, 1 => 500..700_u64];
    let room = prop_oneof![2 => 6..14_u32, 3 => Just(5000_u32)];
    (mode, any::<bool>(), pages, 1..=3_u32, room, 1..=2_u32, sides()).prop_map(
        |(mode, split, pages, parts, memslots, vcpus, initial)| Setup {
            mode,
            // Traps need two views.
            split: split || mode == EnforcementMode::Traps,
            pages,
            parts,
            memslots,
            vcpus,
            initial,
        },
    )
}

fn setups_and_ops() -> impl Strategy<Value = (Setup, Vec<Op>)> {
    setups().prop_flat_map(|setup| (Just(setup), vec(ops(setup.pages), 1..25)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    #[test]
    fn agrees_with_a_list_of_pages((setup, ops) in setups_and_ops()) {
        let (fake, machine) = setup.machine();
        let mut model = Model::new(setup);
        model.check(&fake, &machine);
        for op in ops {
            match op {
                Op::Convert { range, by_shared_view, to, keep, injection } => {
                    if let Some(injection) = injection {
                        fake.inject(injection);
                        let after = injection.after + fake.calls(injection.call);
                        model.pending.push(Injection { after, ..injection });
                    }
                    let bit = u64::from(by_shared_view && setup.split) << BIT;
                    model.convert(&fake, &machine, range, range.gpa() | bit, (to, keep));
                }
                Op::Write { at, len, byte } => {
                    let len = len.min(setup.pages * PAGE_SIZE - at);
                    model.write(&machine, at, len, byte);
                }
                Op::Read { at, len } => model.read(&machine, at, len.min(setup.pages * PAGE_SIZE - at)),
            }
            model.check(&fake, &machine);
        }
    }
}
