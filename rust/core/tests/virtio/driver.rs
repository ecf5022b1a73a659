//! A driver of virtio devices: it runs on the fake's vCPU, which does its port IO and MMIO.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pagegate_core::boot::start::CpuMode;
use pagegate_core::devices::pci::bus::{ADDRESS_PORT, DATA_PORTS};
use pagegate_core::devices::virtio::device::Device;
use pagegate_core::error::Error;
use pagegate_core::events::event::{Event, Kind};
use pagegate_core::hypervisor::fake::{FakeVm, Step};
use pagegate_core::hypervisor::host::EnforcementMode;
use pagegate_core::machine::assembly::Machine;
use pagegate_core::machine::config::{Config, Platform};
use pagegate_core::machine::report::Report;
use pagegate_core::memory::address::{PAGE_SIZE, State};
use pagegate_core::policy::hooks::Policy;

/// The bit of an address that means the private view.
pub const BIT: u32 = 40;
pub const PAGES: u64 = 512;
pub const MEMORY: u64 = PAGES * PAGE_SIZE;
/// How long a test waits for what has to happen.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Registers of the common configuration.
pub mod register {
    pub const DEVICE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURES: u64 = 0x04;
    pub const DRIVER_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURES: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY: u64 = 0x1e;
    pub const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// Bits of the device status.
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
}

pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;
pub const ACCESS_PLATFORM: u64 = 1 << 33;
pub const USUAL: u64 = VERSION_1 | ACCESS_PLATFORM;
pub const NO_VECTOR: u16 = 0xffff;

/// A machine with devices, and the run that its driver does everything in.
pub struct Host {
    pub fake: Arc<FakeVm>,
    pub machine: Arc<Machine>,
    run: Option<JoinHandle<Result<Report, Error>>>,
}

impl Host {
    /// The machine with its first run begun.
    pub fn new(policy: Arc<dyn Policy>, devices: Vec<Arc<dyn Device>>) -> Self {
        let mut host = Self::resting(policy, devices);
        host.begin();
        host
    }

    /// The machine before its first run. The test may read and write its private pages.
    pub fn resting(policy: Arc<dyn Policy>, devices: Vec<Arc<dyn Device>>) -> Self {
        let scripts = vec![vec![Step::Listen]];
        let fake = Arc::new(FakeVm::new(FakeVm::protected(512), scripts, 1));
        let config = Config {
            enforcement: Some(EnforcementMode::Traps),
            private_bit: Some(BIT),
            platform: Platform::Pc,
            debug_private: true,
            events: 1000,
            hypervisor: Some(fake.clone()),
            ..Config::new(MEMORY, policy)
        };
        let machine = Arc::new(Machine::new(config).unwrap());
        for (device, name) in devices.into_iter().zip(["first", "second", "third"]) {
            machine.add_device(name, device, false).unwrap();
        }
        machine.start(0, CpuMode::Long, &[], &mut || Ok(())).unwrap();
        Self {
            fake,
            machine,
            run: None,
        }
    }

    pub fn begin(&mut self) {
        self.begin_for(Some(Duration::from_secs(120)));
    }

    pub fn begin_for(&mut self, timeout: Option<Duration>) {
        let machine = self.machine.clone();
        let body = move || machine.run(timeout, &mut || Ok(()));
        let run = std::thread::spawn(body);
        wait("the run begins", || self.machine.running() || run.is_finished());
        self.run = Some(run);
    }

    /// Ends the run, and returns how it ended and how long that took.
    pub fn stop(&mut self) -> (Result<Report, Error>, Duration) {
        let begun = Instant::now();
        self.machine.stop();
        (self.over(), begun.elapsed())
    }

    /// Waits until the run is over.
    pub fn over(&mut self) -> Result<Report, Error> {
        self.run.take().unwrap().join().unwrap()
    }

    fn execute(&self, step: Step) -> Vec<u8> {
        let shown = format!("{step:x?}");
        self.fake
            .execute(0, step)
            .unwrap_or_else(|| panic!("no answer to {shown}"))
    }

    /// OUT of one value, of 1, 2 or 4 bytes.
    pub fn port_out(&self, port: u16, bytes: &[u8]) {
        self.execute(Step::Io {
            port,
            write: true,
            size: bytes.len() as u8,
            data: bytes.to_vec(),
        });
    }

    pub fn port_in(&self, port: u16, len: usize) -> u64 {
        number(&self.execute(Step::Io {
            port,
            write: false,
            size: len as u8,
            data: vec![0; len],
        }))
    }

    pub fn load(&self, gpa: u64, len: usize) -> u64 {
        number(&self.execute(Step::Mmio {
            gpa,
            write: false,
            data: vec![0; len],
        }))
    }

    pub fn store(&self, gpa: u64, bytes: &[u8]) {
        self.execute(Step::Mmio {
            gpa,
            write: true,
            data: bytes.to_vec(),
        });
    }

    /// A store after which the run may end before it is over.
    pub fn last_store(&self, gpa: u64, bytes: &[u8]) {
        let step = Step::Mmio {
            gpa,
            write: true,
            data: bytes.to_vec(),
        };
        self.fake.hand(0, step);
    }

    fn select(&self, device: u32, at: u64) -> u16 {
        let address = 1 << 31 | device << 11 | at as u32 & 0xfc;
        self.port_out(ADDRESS_PORT, &address.to_le_bytes());
        DATA_PORTS.start() + (at & 3) as u16
    }

    /// Reads the configuration space of a device.
    pub fn config(&self, device: u32, at: u64, len: usize) -> u64 {
        let port = self.select(device, at);
        self.port_in(port, len)
    }

    pub fn set_config(&self, device: u32, at: u64, bytes: &[u8]) {
        let port = self.select(device, at);
        self.port_out(port, bytes);
    }

    pub fn convert(&self, gpa: u64, to: State) {
        self.machine.convert(gpa, PAGE_SIZE, to).unwrap();
    }

    /// Makes pages private and fills them with bytes that no device must see or change.
    pub fn hide(&self, gpa: u64, len: u64) {
        self.machine.convert(gpa, len, State::Private).unwrap();
        self.write(gpa, &vec![SECRET; len as usize]);
    }

    /// Checks that nobody wrote to pages that were hidden, on either side, and shows them.
    pub fn check_hidden(&self, gpa: u64, len: u64) {
        assert_eq!(self.read(gpa, len as usize), vec![SECRET; len as usize]);
        self.machine.memory().convert(gpa, len, State::Shared, true).unwrap();
        assert_eq!(self.read(gpa, len as usize), vec![0; len as usize], "the other side");
    }

    pub fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.machine.read(gpa, &mut bytes).unwrap();
        bytes
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.machine.write(gpa, bytes).unwrap();
    }

    /// The events of devices.
    pub fn events(&self) -> Vec<Event> {
        let mut events = self.machine.events().since(0);
        events.retain(|event| event.kind == Kind::Device);
        events
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.machine.stop();
        if let Some(run) = self.run.take() {
            let _ = run.join();
        }
    }
}

/// What hidden pages are filled with.
pub const SECRET: u8 = 0xa5;

/// Waits until something is so.
pub fn wait(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < PATIENCE, "it is not so: {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn number(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// A virtio device as its driver finds it.
pub struct Virtio<'a> {
    pub host: &'a Host,
    /// Its number on the bus.
    pub number: u32,
    /// Where its registers are.
    pub bar: u64,
    pub common: u64,
    pub isr: u64,
    pub device: u64,
    notify: u64,
    stride: u64,
    /// Offsets in the configuration space: of the window to BAR 0, and of the MSI-X capability.
    pub window: u64,
    pub msix: u64,
}

impl<'a> Virtio<'a> {
    /// Follows its capabilities.
    pub fn find(host: &'a Host, number: u32) -> Self {
        assert_eq!(host.config(number, 0, 2), 0x1af4, "the vendor");
        host.set_config(number, 4, &6_u16.to_le_bytes());
        let bar = host.config(number, 0x10, 4) & !0xf;
        let mut found = Self {
            host,
            number,
            bar,
            common: 0,
            isr: 0,
            device: 0,
            notify: 0,
            stride: 0,
            window: 0,
            msix: 0,
        };
        let mut at = host.config(number, 0x34, 1);
        while at != 0 {
            found.note(at);
            at = host.config(number, at + 1, 1);
        }
        found
    }

    fn note(&mut self, at: u64) {
        let read = |offset, len| self.host.config(self.number, at + offset, len);
        match read(0, 1) {
            0x11 => self.msix = at,
            0x09 => {
                let (kind, place) = (read(3, 1), self.bar + read(8, 4));
                assert_eq!(read(4, 1), 0, "the BAR");
                match kind {
                    1 => self.common = place,
                    2 => (self.notify, self.stride) = (place, read(16, 4)),
                    3 => self.isr = place,
                    4 => self.device = place,
                    5 => self.window = at,
                    other => panic!("capability of type {other}"),
                }
            }
            other => panic!("capability {other:#x}"),
        }
    }

    pub fn get(&self, register: u64, len: usize) -> u64 {
        self.host.load(self.common + register, len)
    }

    pub fn set(&self, register: u64, bytes: &[u8]) {
        self.host.store(self.common + register, bytes);
    }

    pub fn status(&self) -> u8 {
        self.get(register::STATUS, 1) as u8
    }

    pub fn set_status(&self, status: u8) {
        self.set(register::STATUS, &[status]);
    }

    pub fn offered(&self) -> u64 {
        [1_u32, 0].iter().fold(0, |features, half| {
            self.set(register::DEVICE_SELECT, &half.to_le_bytes());
            features << 32 | self.get(register::DEVICE_FEATURES, 4)
        })
    }

    pub fn accept(&self, features: u64) {
        for half in [0_u32, 1] {
            self.set(register::DRIVER_SELECT, &half.to_le_bytes());
            self.set(
                register::DRIVER_FEATURES,
                &((features >> (32 * half)) as u32).to_le_bytes(),
            );
        }
    }

    /// As far as FEATURES_OK. Returns the status.
    pub fn negotiate(&self, features: u64) -> u8 {
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        self.accept(features);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        self.status()
    }

    pub fn drive(&self) {
        self.set_status(self.status() | status::DRIVER_OK);
    }

    pub fn select_queue(&self, queue: u16) {
        self.set(register::QUEUE_SELECT, &queue.to_le_bytes());
    }

    /// Writes a 64-bit register of the selected queue.
    pub fn set_address(&self, register: u64, address: u64) {
        self.set(register, &(address as u32).to_le_bytes());
        self.set(register + 4, &((address >> 32) as u32).to_le_bytes());
    }

    pub fn set_up(&self, queue: u16, size: u16, [descriptors, driver, device]: [u64; 3]) {
        self.select_queue(queue);
        self.set(register::QUEUE_SIZE, &size.to_le_bytes());
        self.set_address(register::QUEUE_DESCRIPTORS, descriptors);
        self.set_address(register::QUEUE_DRIVER, driver);
        self.set_address(register::QUEUE_DEVICE, device);
        self.set(register::QUEUE_ENABLE, &1_u16.to_le_bytes());
    }

    pub fn doorbell(&self, queue: u16) -> u64 {
        self.select_queue(queue);
        self.notify + self.get(register::QUEUE_NOTIFY, 2) * self.stride
    }

    pub fn kick(&self, queue: u16) {
        let doorbell = self.doorbell(queue);
        self.host.store(doorbell, &queue.to_le_bytes());
    }

    /// Resets it and waits until it has let go.
    pub fn reset(&self) {
        self.set_status(0);
        wait("the status reads 0 after a reset", || self.status() == 0);
    }

    pub fn wait_until_broken(&self) {
        wait("the device needs a reset", || self.status() & status::NEEDS_RESET != 0);
    }
}
