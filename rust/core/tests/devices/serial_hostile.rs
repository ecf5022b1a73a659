//! A guest that accesses the serial port's registers at random.

use proptest::prelude::*;

use pagegate_core::devices::console::{Console, INPUT_LIMIT};

use crate::port_io::{read, write};
use crate::serial_driver::*;

const OUTPUT_LIMIT: usize = 1000;
const LOOPBACK: u8 = 1 << 4;
const DLAB: u8 = 1 << 7;

#[derive(Clone, Debug)]
enum Step {
    Write { register: u16, size: u8, bytes: Vec<u8> },
    Read { register: u16, size: u8, count: usize },
    Input(Vec<u8>),
}

fn size() -> impl Strategy<Value = u8> {
    prop_oneof![4 => Just(1u8), 1 => Just(2), 1 => Just(4)]
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = |count: usize, size: u8| prop::collection::vec(any::<u8>(), count * usize::from(size));
    prop_oneof![
        6 => (0..8u16, size(), prop_oneof![4 => Just(1usize), 1 => 1..100usize]).prop_flat_map(
            move |(register, size, count)| {
                bytes(count, size).prop_map(move |bytes| Step::Write { register, size, bytes })
            }
        ),
        6 => (0..8u16, size(), 1..100usize).prop_map(|(register, size, count)| Step::Read { register, size, count }),
        1 => prop::collection::vec(any::<u8>(), 0..2000).prop_map(Step::Input),
    ]
}

/// The registers that decide what a write to the first one is, and how much output there was.
#[derive(Default)]
struct Model {
    lcr: u8,
    mcr: u8,
    output: u64,
}

impl Model {
    fn write(&mut self, register: u16, value: u8) {
        match register {
            DATA if (self.lcr & DLAB, self.mcr & LOOPBACK) == (0, 0) => self.output += 1,
            LCR => self.lcr = value,
            MCR => self.mcr = value,
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    /// Some 400,000 registers are accessed in all. Whatever the guest did, the port works afterwards.
    #[test]
    fn random_accesses_do_no_harm(steps in prop::collection::vec(step(), 0..600)) {
        let driver = Driver::new(Console::new(OUTPUT_LIMIT));
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Write { register, size, bytes } => {
                    write(&*driver.serial, COM1 + register, size, &bytes);
                    for access in bytes.chunks(size.into()) {
                        (register..).zip(access).for_each(|(register, value)| model.write(register, *value));
                    }
                }
                Step::Read { register, size, count } => {
                    let data = read(&*driver.serial, COM1 + register, size, count * usize::from(size));
                    for access in data.chunks(size.into()) {
                        let mut beyond = (register..).zip(access).filter(|(register, _)| *register > SCRATCH);
                        prop_assert!(beyond.all(|(_, byte)| *byte == 0xff));
                    }
                }
                Step::Input(bytes) => _ = driver.console.write(&bytes),
            }
        }
        prop_assert_eq!(driver.console.total(), model.output);
        prop_assert_eq!(driver.output().len() as u64, model.output.min(OUTPUT_LIMIT as u64));

        driver.out(LCR, 0x03);
        driver.out(MCR, 0x08);
        driver.out(IER, 0);
        // Loopback may have left more than the queue's bytes: those in the FIFO.
        let left = std::iter::from_fn(|| driver.poll()).take(INPUT_LIMIT + 65).count();
        prop_assert!(left <= INPUT_LIMIT + 64);
        driver.interrupts();
        driver.inb(IIR);
        driver.out(IER, RECEIVE);
        driver.console.write(b"in");
        prop_assert_eq!(driver.answer_interrupts(), b"in");
        driver.out(DATA, b'!');
        prop_assert!(driver.output().ends_with(b"!"));
    }
}
