//! Port IO and MMIO outside of memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pagegate_core::devices::bus::{IoHandler, MmioHandler};
use pagegate_core::error::{Error, Failure};
use pagegate_core::hypervisor::exit::{Io, Mmio};
use pagegate_core::hypervisor::fake::{Reply, Step};

use crate::guest::*;

#[test]
fn port_io_is_answered() {
    let script = vec![io_read(0x10, 3), io_read(0x11, 2)];
    let guest = PLAIN.guest(vec![script], Judge::allow());
    let answer = handler(|_| Ok(()));
    answer.machine.set(&guest);
    guest.machine.on_io(0x10, answer).unwrap();
    guest.run();
    let values: Vec<Vec<u8>> = guest.fake.replies(0).into_iter().map(|reply| reply.value).collect();
    assert_eq!(values, [vec![0x5a; 3], vec![0xff; 2]]);
}

#[test]
fn a_device_handler_that_failed_is_called_again_by_the_next_run() {
    struct Flaky(AtomicU32);
    impl IoHandler for Flaky {
        fn io(&self, _: u32, _: &Io, data: &mut [u8]) -> Result<(), Failure> {
            if self.0.fetch_add(1, Ordering::SeqCst) == 0 {
                return Err("flaky".into());
            }
            data.fill(7);
            Ok(())
        }
    }
    impl MmioHandler for Flaky {
        fn mmio(&self, _: u32, mmio: &Mmio, data: &mut [u8]) -> Result<(), Failure> {
            assert_eq!((mmio.gpa, data.len()), (0xfec0_0008, 8));
            if self.0.fetch_add(1, Ordering::SeqCst) == 0 {
                return Err("flaky".into());
            }
            data.fill(7);
            Ok(())
        }
    }
    let mmio = Step::Access {
        gpa: 0xfec0_0008,
        write: false,
    };
    for step in [io_read(0x10, 8), mmio] {
        let guest = PLAIN.guest(vec![vec![step]], Judge::allow());
        let flaky = Arc::new(Flaky(AtomicU32::new(0)));
        guest.machine.on_io(0x10, flaky.clone()).unwrap();
        guest.machine.on_mmio(0xfec0_0000, 0x1000, flaky.clone()).unwrap();
        match guest.try_run() {
            Err(Error::Hook { failure, .. }) => assert_eq!(failure.to_string(), "flaky"),
            other => panic!("{other:?}"),
        }
        assert!(guest.fake.replies(0).is_empty());
        assert_eq!(guest.run().reason, "halt");
        assert_eq!(flaky.0.load(Ordering::SeqCst), 2);
        assert_eq!(
            guest.fake.replies(0),
            [Reply {
                step: 0,
                value: vec![7; 8]
            }]
        );
    }
}

#[test]
fn the_guest_gets_the_answer_of_a_handler_that_stops_the_run() {
    let guest = PLAIN.guest(vec![vec![io_read(0x10, 1), io_read(0x10, 1)]], Judge::allow());
    let stop = handler(|machine| {
        machine.stop();
        Ok(())
    });
    stop.machine.set(&guest);
    guest.machine.on_io(0x10, stop).unwrap();
    for answered in 1..=2 {
        assert_eq!(guest.run().reason, "stopped");
        let replies = guest.fake.replies(0);
        assert_eq!(replies.len(), answered);
        assert!(replies.iter().all(|reply| reply.value == [0x5a]));
    }
    assert_eq!(guest.run().reason, "halt");
}
