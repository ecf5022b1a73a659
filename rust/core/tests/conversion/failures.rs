//! Conversions that are refused or fail: what was changed before is undone.

use pagegate_core::error::{ConvertError, Error};
use pagegate_core::hypervisor::fake::{CallName, Injection};
use pagegate_core::hypervisor::host::EnforcementMode;
use pagegate_core::memory::address::{PAGE_SIZE, State};

use crate::common::BIT;
use crate::setup::{ALL_CALLS, Calls, Setup, calls, error, every_setup, states};

#[test]
fn ranges_outside_memory_are_refused() {
    for setup in every_setup() {
        let (fake, machine) = setup.machine();
        let before = calls(&fake);
        let memory = setup.pages * PAGE_SIZE;
        let mut ranges = vec![
            (0, 0),
            (0x1000, 0x800),
            (0x800, 0x1000),
            (0, memory + PAGE_SIZE),
            (memory, PAGE_SIZE),
            (memory - PAGE_SIZE, 2 * PAGE_SIZE),
            (u64::MAX - 0xfff, 0x2000),
            (0, u64::MAX - 0xfff),
            (1 << 41, PAGE_SIZE),
        ];
        if !setup.split {
            ranges.push((1 << BIT, PAGE_SIZE));
        }
        for (gpa, size) in ranges {
            let refused = error(machine.convert(gpa, size, setup.initial.other()));
            let says = format!(
                "range {gpa:#x} + {size:#x} is not a page-aligned, non-empty part of the guest's {memory:#x} bytes"
            );
            assert_eq!(refused.to_string(), says);
        }
        assert_eq!(calls(&fake), before);
        assert_eq!(machine.memory().generation(), 0);
    }
}

#[test]
fn each_call_that_fails_is_undone() {
    for setup in every_setup() {
        // Pages in either state inside the range, so that slots are merged and split.
        let prepared = || {
            let (fake, machine) = setup.machine();
            machine.convert(0x8000, 0x4000, setup.initial.other()).unwrap();
            machine.convert(0x1e000, 0x4000, setup.initial.other()).unwrap();
            (fake, machine)
        };
        for to in [State::Private, State::Shared] {
            let (fake, machine) = prepared();
            let before = calls(&fake);
            machine.convert(0x4000, 0x20000, to).unwrap();
            let made = calls(&fake);
            for call in ALL_CALLS {
                for after in 0..made[&call] - before[&call] {
                    for half_done in [false, true] {
                        let (fake, machine) = prepared();
                        fake.inject(Injection {
                            call,
                            after,
                            errno: libc::ENOMEM,
                            half_done,
                            forever: false,
                        });
                        let (old, generation) = (states(&machine), machine.memory().generation());
                        let failed = error(machine.convert(0x4000, 0x20000, to));
                        if call == CallName::Discard {
                            let ConvertError::Partly {
                                gpa,
                                size,
                                changed,
                                source,
                            } = failed
                            else {
                                panic!("{failed:?}");
                            };
                            let differ = old.iter().zip(states(&machine)).filter(|(old, new)| **old != *new);
                            assert_eq!((gpa, size), (0x4000, 0x20000));
                            assert_eq!(changed, differ.count() as u64 * PAGE_SIZE);
                            assert!(matches!(*source, ConvertError::Discard { .. }), "{source:?}");
                            assert_eq!(machine.memory().generation(), generation + 1);
                        } else {
                            assert!(matches!(failed, ConvertError::Undone { .. }), "{failed:?}");
                            assert_eq!(failed.guest_errno().unwrap().0, libc::ENOMEM);
                            assert_eq!(states(&machine), old);
                            assert_eq!(machine.memory().generation(), generation);
                        }
                        setup.check_told(&fake, &states(&machine));
                        // The same conversion succeeds later.
                        machine.convert(0x4000, 0x20000, to.other()).unwrap();
                        machine.convert(0x4000, 0x20000, to).unwrap();
                        setup.check_told(&fake, &states(&machine));
                    }
                }
            }
        }
    }
}

#[test]
fn after_an_undo_that_failed_nothing_is_converted_any_more() {
    for setup in every_setup() {
        let (fake, machine) = setup.machine();
        machine.convert(0x8000, 0x4000, setup.initial.other()).unwrap();
        let call = match setup.mode {
            EnforcementMode::Attributes | EnforcementMode::Traps => CallName::SetAttributes,
            EnforcementMode::Memslots => CallName::CreateMemslot,
        };
        fake.inject(Injection {
            call,
            after: 0,
            errno: libc::ENOMEM,
            half_done: true,
            forever: true,
        });
        let old = states(&machine);
        let failed = error(machine.convert(0x4000, 0x10000, setup.initial.other()));
        assert!(
            matches!(failed, ConvertError::Inconsistent { .. }),
            "{setup:?}: {failed:?}"
        );
        assert_eq!(failed.guest_errno(), None);
        let made = calls(&fake);
        let blocked = error(machine.convert(0x30000, 0x1000, setup.initial.other()));
        assert!(
            matches!(blocked, ConvertError::Inconsistent { .. }),
            "{setup:?}: {blocked:?}"
        );
        // A conversion that would change nothing fails too: what KVM enforces is not known.
        let claimed = error(machine.convert(0x30000, 0x1000, setup.initial));
        assert!(
            matches!(claimed, ConvertError::Inconsistent { .. }),
            "{setup:?}: {claimed:?}"
        );
        assert_eq!(calls(&fake), made);
        assert_eq!(states(&machine), old);
    }
}

#[test]
fn too_few_slots_are_noticed_before_kvm_is_asked() {
    for split in [false, true] {
        for mode in [EnforcementMode::Memslots, EnforcementMode::Attributes] {
            let setup = Setup {
                mode,
                split,
                pages: 64,
                parts: 1,
                memslots: 4,
                vcpus: 1,
                initial: State::Shared,
            };
            if mode == EnforcementMode::Attributes && !split {
                // Attributes with one view take one slot, whatever the states.
                let (fake, machine) = setup.machine();
                for page in (0..64).step_by(2) {
                    machine.convert(page * PAGE_SIZE, PAGE_SIZE, State::Private).unwrap();
                }
                setup.check_told(&fake, &states(&machine));
                continue;
            }
            let (fake, machine) = setup.machine();
            let mut refused = None;
            for page in (1..63).step_by(2) {
                let made = calls(&fake);
                match machine.convert(page * PAGE_SIZE, PAGE_SIZE, State::Private) {
                    Ok(_) => assert_eq!(refused, None),
                    Err(Error::HostConversion(error @ ConvertError::NoSlots { .. })) => {
                        assert_eq!(error.guest_errno().unwrap().0, libc::ENOSPC);
                        refused.get_or_insert(page);
                        let slot_calls =
                            |calls: &Calls| (calls[&CallName::CreateMemslot], calls[&CallName::DeleteMemslot]);
                        assert_eq!(slot_calls(&calls(&fake)), slot_calls(&made));
                    }
                    other => panic!("{other:?}"),
                }
                setup.check_told(&fake, &states(&machine));
            }
            assert!(refused.is_some());
        }
    }
}
