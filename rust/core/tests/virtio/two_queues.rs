//! A device that takes requests of one queue while it works on those of another, as a network card does.

use std::sync::Arc;

use pagegate_core::devices::virtio::device::Device;
use pagegate_core::devices::virtio::queue::{Queue, total};
use pagegate_core::error::Failure;

use crate::driver::{Host, USUAL, Virtio};
use crate::rings::{Rings, USUAL_PLACE};
use crate::test_devices::Judge;

const SIZE: u16 = 8;
const DATA: u64 = 0x2_0000;
const ANSWERS: u64 = 0x2_1000;

/// Answers each request of queue 0 in a buffer of queue 1. A request without a buffer waits for one.
#[derive(Default)]
struct Answering {
    waiting: parking_lot::Mutex<u32>,
}

impl Device for Answering {
    fn id(&self) -> u16 {
        42
    }

    fn queues(&self) -> &[u16] {
        &[SIZE, SIZE]
    }

    fn process(&self, queues: &mut Vec<Queue>, _: usize) -> Result<(), Failure> {
        let mut waiting = self.waiting.lock();
        while let Some(request) = queues[0].take() {
            queues[0].complete(request, 0);
            *waiting += 1;
        }
        while *waiting > 0
            && let Some(buffer) = queues[1].take()
        {
            let written = total(buffer.writable()) as u32;
            buffer
                .write(0, &vec![1; written as usize])
                .map_err(|_| "a wrong buffer")?;
            queues[1].complete(buffer, written);
            *waiting -= 1;
        }
        Ok(())
    }
}

#[test]
fn the_other_queue_is_not_used_up_by_turns_of_the_first() {
    let host = Host::new(Judge::deny(), vec![Arc::new(Answering::default())]);
    let device = Virtio::find(&host, 1);
    device.negotiate(USUAL);
    let requests = Rings::queue(&device, 0, SIZE, USUAL_PLACE);
    let answers = Rings::queue(&device, 1, SIZE, USUAL_PLACE.map(|place| place + 0x3000));
    device.drive();
    requests.chain(0, &[(DATA, 16, false)]);
    answers.chain(0, &[(ANSWERS, 16, true)]);
    for turn in 1..=4 {
        // The driver need not notify the device of buffers that it gives it.
        (0..SIZE).for_each(|_| answers.offer(0));
        (0..SIZE).for_each(|_| requests.offer(0));
        device.kick(0);
        answers.wait(turn * SIZE);
        assert_eq!(requests.completed(), turn * SIZE);
    }
    assert_eq!(host.read(ANSWERS, 16), [1; 16]);
}
