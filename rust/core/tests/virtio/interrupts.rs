//! MSI-X: messages where the guest wants them, masked and pending ones, and the ISR.

use std::sync::Arc;

use pagegate_core::devices::virtio::rng::Rng;
use pagegate_core::hypervisor::interrupts::{Message, PINS};

use crate::driver::{Host, USUAL, Virtio, register, wait};
use crate::rings::{Rings, USUAL_PLACE};
use crate::test_devices::Judge;

const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
/// The message of vector 1.
const MESSAGE: Message = Message {
    address: 0xfee0_1000,
    data: 0x4041,
};

/// An rng whose queue has vector 1, and who turns MSI-X on and off.
struct Guest<'a> {
    device: Virtio<'a>,
    rings: Rings<'a>,
    table: u64,
    pending: u64,
    requests: std::cell::Cell<u16>,
}

impl<'a> Guest<'a> {
    fn new(host: &'a Host) -> Self {
        let device = Virtio::find(host, 1);
        let place = |at| device.bar + (host.config(1, device.msix + at, 4) & !7);
        let (table, pending) = (place(4), place(8));
        device.negotiate(USUAL);
        let rings = Rings::queue(&device, 0, 8, USUAL_PLACE);
        device.set(register::QUEUE_VECTOR, &1_u16.to_le_bytes());
        device.set(register::CONFIG_VECTOR, &0_u16.to_le_bytes());
        device.drive();
        Self {
            device,
            rings,
            table,
            pending,
            requests: Default::default(),
        }
    }

    fn control(&self, control: u16) {
        let device = &self.device;
        device.host.set_config(1, device.msix + 2, &control.to_le_bytes());
    }

    /// Writes the words of an entry.
    fn entry(&self, vector: u64, Message { address, data }: Message, masked: bool) {
        let words = [address as u32, (address >> 32) as u32, data, u32::from(masked)];
        for (word, at) in words.iter().zip((self.table + vector * 16..).step_by(4)) {
            self.device.host.store(at, &word.to_le_bytes());
        }
    }

    fn mask(&self, vector: u64, masked: bool) {
        let control = self.table + vector * 16 + 12;
        self.device.host.store(control, &u32::from(masked).to_le_bytes());
    }

    /// Has the device complete a request.
    fn request(&self) {
        self.requests.set(self.requests.get() + 1);
        self.rings.chain(0, &[(0x2_0000, 16, true)]);
        self.rings.offer(0);
        self.device.kick(0);
        self.rings.wait(self.requests.get());
    }

    fn pending(&self) -> u64 {
        self.device.host.load(self.pending, 8)
    }
}

fn host() -> Host {
    Host::new(Judge::deny(), vec![Arc::new(Rng)])
}

const LINE: u32 = PINS + 1;

#[test]
fn a_message_goes_where_the_table_says() {
    let host = host();
    let guest = Guest::new(&host);
    assert_eq!(
        guest.device.host.config(1, guest.device.msix + 2, 2),
        1,
        "two vectors, off"
    );
    guest.entry(1, MESSAGE, false);
    guest.control(ENABLE);
    assert_eq!(host.fake.messages()[1], Some(MESSAGE));
    guest.request();
    wait("it is raised", || host.fake.raised(LINE) == 1);
    assert_eq!(host.fake.raised(PINS), 0);
    let elsewhere = Message {
        address: 0x1_fee0_2000,
        data: 7,
    };
    guest.mask(1, true);
    guest.entry(1, elsewhere, false);
    assert_eq!(host.fake.messages()[1], Some(elsewhere));
}

#[test]
fn a_masked_interrupt_is_pending_until_it_is_unmasked() {
    let host = host();
    let guest = Guest::new(&host);
    guest.entry(1, MESSAGE, true);
    guest.control(ENABLE);
    guest.request();
    wait("it is pending", || guest.pending() == 1 << 1);
    assert_eq!(host.fake.raised(LINE), 0);
    guest.mask(1, false);
    assert_eq!((guest.pending(), host.fake.raised(LINE)), (0, 1));
    guest.control(ENABLE | FUNCTION_MASK);
    guest.request();
    wait("it is pending", || guest.pending() == 1 << 1);
    assert_eq!(host.fake.raised(LINE), 0);
    guest.control(ENABLE);
    assert_eq!((guest.pending(), host.fake.raised(LINE)), (0, 1));
}

#[test]
fn without_msix_there_is_no_interrupt() {
    let host = host();
    let guest = Guest::new(&host);
    guest.entry(1, MESSAGE, false);
    guest.request();
    wait("the ISR says so", || host.load(guest.device.isr, 1) == 1);
    guest.control(ENABLE);
    assert_eq!((host.fake.raised(LINE), guest.pending()), (0, 0));
}

#[test]
fn reading_the_isr_and_a_reset_clear_it() {
    let host = host();
    let guest = Guest::new(&host);
    guest.request();
    wait("the ISR says so", || host.load(guest.device.isr, 1) == 1);
    assert_eq!(host.load(guest.device.isr, 1), 0);
    guest.entry(1, MESSAGE, true);
    guest.control(ENABLE);
    guest.request();
    wait("it is pending", || guest.pending() == 1 << 1);
    guest.device.reset();
    assert_eq!(host.load(guest.device.isr, 1), 0);
    assert_eq!(guest.pending(), 0, "an interrupt of before the reset");
    guest.mask(1, false);
    assert_eq!(host.fake.raised(LINE), 0);
}

#[test]
fn the_table_is_accessed_by_words() {
    let host = host();
    let guest = Guest::new(&host);
    guest.entry(1, MESSAGE, true);
    let at = guest.table + 16;
    assert_eq!(host.load(at, 8), MESSAGE.address);
    assert_eq!(host.load(at + 8, 4), u64::from(MESSAGE.data));
    for len in [1, 2] {
        host.store(at, &vec![0; len]);
        assert_eq!(host.load(at, 4), MESSAGE.address);
    }
    host.store(at + 4, &[0xff; 8]);
    assert_eq!(host.load(at, 8), MESSAGE.address, "not aligned");
    // Entries that there are not.
    for beyond in [2 * 16, 64 * 16, 0x1ff8] {
        host.store(guest.table + beyond, &[0; 8]);
        assert_eq!(host.load(guest.table + beyond, 8), u64::MAX);
    }
    assert_eq!(host.load(guest.pending + 0x1ff8, 8), 0);
    host.store(guest.pending, &[0xff; 8]);
    assert_eq!(guest.pending(), 0, "the pending bits are the device's");
}
