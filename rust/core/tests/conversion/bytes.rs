//! What the host reads after conversions: zeroes where the old side was discarded, the old bytes where it was kept.

use pagegate_core::error::Error;
use pagegate_core::hypervisor::fake::CallName;
use pagegate_core::memory::address::State;

use crate::setup::every_setup;

#[test]
fn pages_converted_to_private_and_back_read_as_zeroes() {
    for setup in every_setup() {
        let (_, machine) = setup.machine();
        machine.convert(0, 0x8000, State::Shared).unwrap();
        machine.write(0x2ff0, &[7; 0x2020]).unwrap();
        machine.convert(0x3000, 0x1000, State::Private).unwrap();
        assert!(matches!(
            machine.read(0x2ff0, &mut [0; 0x20]),
            Err(Error::PrivateMemory { gpa: 0x3000, .. })
        ));
        machine.convert(0x2000, 0x4000, State::Shared).unwrap();
        let mut bytes = vec![1; 0x2020];
        machine.read(0x2ff0, &mut bytes).unwrap();
        assert!(
            bytes[..0x10].iter().all(|byte| *byte == 7),
            "{setup:?}: the page before it changed"
        );
        assert!(
            bytes[0x10..0x1010].iter().all(|byte| *byte == 0),
            "{setup:?}: old bytes came back"
        );
        assert!(
            bytes[0x1010..].iter().all(|byte| *byte == 7),
            "{setup:?}: the page after it changed"
        );
    }
}

#[test]
fn bytes_that_were_not_discarded_are_still_there() {
    for setup in every_setup() {
        let (fake, machine) = setup.machine();
        machine.convert(0, 0x8000, State::Shared).unwrap();
        machine.write(0x2ff0, &[7; 0x2020]).unwrap();
        let discards = fake.calls(CallName::Discard);
        machine.memory().convert(0x2000, 0x3000, State::Private, true).unwrap();
        let mut bytes = vec![1; 0x2020];
        assert!(matches!(
            machine.read(0x2ff0, &mut bytes),
            Err(Error::PrivateMemory { gpa: 0x2000, .. })
        ));
        machine.memory().convert(0, 0x8000, State::Shared, true).unwrap();
        machine.read(0x2ff0, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 0x2020]);
        assert_eq!(fake.calls(CallName::Discard), discards);
    }
}
