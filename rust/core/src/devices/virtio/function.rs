//! A virtio device on PCI: its configuration space, and its registers in BAR 0.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use parking_lot::Mutex;
use virtio_queue::Queue as Ring;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Device, LARGEST_QUEUE, MOST_QUEUES};
use super::registers::{After, Registers};
use super::run::Name;
use crate::devices::pci::bus::{Function, WINDOW};
use crate::devices::pci::config::{Config, Identity};
use crate::devices::pci::messages::Messages;
use crate::devices::pci::msix::{self, Msix};
use crate::errno::Errno;
use crate::error::{Error, Failure};
use crate::hypervisor::vm::Hypervisor;

const VENDOR: u16 = 0x1af4;
/// The PCI device ID of virtio's device 0.
const FIRST_DEVICE_ID: u16 = 0x1040;
/// The device IDs that PCI has for virtio end at 0x107f.
const HIGHEST_ID: u16 = 0x3f;

/// BAR 0, and what is where in it.
const BAR_SIZE: u64 = 0x8000;
const COMMON: Range<u64> = 0x0000..0x0040;
const ISR: Range<u64> = 0x1000..0x1004;
const DEVICE: Range<u64> = 0x2000..0x3000;
/// A doorbell for each queue.
const NOTIFY: Range<u64> = 0x3000..0x3000 + STRIDE * MOST_QUEUES as u64;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x6000;
/// Bytes from one doorbell to the next.
const STRIDE: u64 = 4;

const VENDOR_CAPABILITY: u8 = 0x09;
const MSIX_CAPABILITY: u8 = 0x11;
/// Where message control is in its capability, and where the window's fields are in theirs.
const MSIX_CONTROL: usize = 2;
const WINDOW_OFFSET: usize = 8;
const WINDOW_LENGTH: usize = 12;
const WINDOW_DATA: usize = 16;

/// The command register, and its bit for reading and writing memory.
const COMMAND: usize = 4;
const BUS_MASTER: u16 = 1 << 2;

/// ISR: a queue's interrupt, and the configuration's.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The device's own configuration space.
struct Space {
    bytes: Vec<u8>,
    /// Another one after each change, so that a driver that reads a field in two accesses sees that it changed between.
    generation: u8,
    /// The [`VirtioFunction::refresh_begins`] that it is of.
    refresh: u64,
}

/// A device on the bus.
pub(crate) struct VirtioFunction {
    pub(crate) name: Name,
    pub(crate) device: Arc<dyn Device>,
    pub(super) config: Mutex<Config>,
    /// Offsets of capabilities in the configuration space.
    msix_at: usize,
    window_at: usize,
    pub(crate) registers: Mutex<Registers>,
    pub(super) msix: Mutex<Msix>,
    pub(super) isr: AtomicU8,
    space: Mutex<Space>,
    refreshes: AtomicU64,
    /// The registers want the device's thread to do something.
    pub(crate) wake: EventFd,
    /// The doorbells.
    pub(crate) kicks: Vec<EventFd>,
    hypervisor: Arc<dyn Hypervisor>,
    /// Where KVM knows the doorbells to be.
    doorbells: Mutex<Option<u64>>,
    /// The queues in use; for the device's thread only.
    pub(crate) rings: Mutex<Option<Vec<Ring>>>,
}

impl VirtioFunction {
    /// A device with its registers at `address`, and `space` in its own configuration space.
    pub(crate) fn new(
        name: Name,
        device: Arc<dyn Device>,
        space: Vec<u8>,
        address: u32,
        messages: Arc<Messages>,
        hypervisor: Arc<dyn Hypervisor>,
    ) -> Result<Self, Error> {
        let what = "give a device its interrupts and doorbells";
        let failed = |errno: Errno| Error::Host { what, errno };
        let sizes = device.queues();
        let is_sound = |size: &u16| size.is_power_of_two() && *size <= LARGEST_QUEUE;
        if sizes.len() > MOST_QUEUES || !sizes.iter().all(is_sound) {
            let name = &name.name;
            return Err(Error::Invalid(format!(
                "device {name}: it has {} queues of sizes {sizes:?}; there are at most {MOST_QUEUES}, of powers of two up \
                 to {LARGEST_QUEUE}",
                sizes.len()
            )));
        }
        if device.id() > HIGHEST_ID {
            let (name, id) = (&name.name, device.id());
            return Err(Error::Invalid(format!(
                "device {name}: there is no virtio device of type {id} on PCI; the highest is {HIGHEST_ID}"
            )));
        }
        let msix = Msix::new(messages, sizes.len() + 1).map_err(failed)?;
        let event = || EventFd::new(EFD_NONBLOCK).map_err(|error| failed(error.into()));
        let (config, msix_at, window_at) = configuration(device.as_ref(), address, msix.len());
        Ok(Self {
            name,
            registers: Mutex::new(Registers::new(device.features(), sizes, msix.len() as u16)),
            kicks: sizes.iter().map(|_| event()).collect::<Result<_, _>>()?,
            device,
            config: Mutex::new(config),
            msix_at,
            window_at,
            msix: Mutex::new(msix),
            isr: AtomicU8::new(0),
            space: Mutex::new(Space {
                bytes: space,
                generation: 0,
                refresh: 0,
            }),
            refreshes: AtomicU64::new(0),
            wake: event()?,
            hypervisor,
            doorbells: Mutex::default(),
            rings: Mutex::default(),
        })
    }

    /// Tells the driver that requests of a queue were completed.
    pub(crate) fn interrupt(&self, queue: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        let vector = self.registers.lock().vector(queue);
        self.msix.lock().raise(vector);
    }

    /// The device cannot go on until its driver resets it.
    pub(crate) fn fail(&self) {
        self.registers.lock().needs_reset();
        self.config_interrupt();
    }

    /// The device is about to be asked for its own configuration space, which may be asked for by others, too, and take
    /// long. Returns the number of this time.
    pub(crate) fn refresh_begins(&self) -> u64 {
        self.refreshes.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// The device's own configuration space, as it was after a refresh began. It stays as it is if that of a later refresh is
    /// there already: this one may be older, and whatever it has that is new, the later one has, too.
    pub(crate) fn set_space(&self, refresh: u64, bytes: Vec<u8>) {
        let mut space = self.space.lock();
        if refresh < space.refresh {
            return;
        }
        space.refresh = refresh;
        if space.bytes == bytes {
            return;
        }
        *space = Space {
            bytes,
            generation: space.generation.wrapping_add(1),
            refresh,
        };
        drop(space);
        if self.registers.lock().is_live() {
            self.config_interrupt();
        }
    }

    /// The device's own configuration space, and its generation.
    pub(super) fn space(&self) -> (Vec<u8>, u8) {
        let space = self.space.lock();
        (space.bytes.clone(), space.generation)
    }

    /// The driver has seen this space, of this generation. It is told if the space is another one now.
    pub(super) fn continue_space(&self, seen: &[u8], generation: u8) {
        let mut space = self.space.lock();
        let is_other = space.bytes != seen;
        space.generation = generation.wrapping_add(is_other.into());
        drop(space);
        if is_other && self.registers.lock().is_live() {
            self.config_interrupt();
        }
    }

    /// Has KVM know what the configuration space says: where the doorbells are, and what the interrupts are.
    pub(super) fn place(&self, config: &Config) -> Result<(), Failure> {
        let control = config.u16(self.msix_at + MSIX_CONTROL);
        let bar = place(config);
        // With it locked, so that of two writes the last one counts.
        self.msix.lock().set_control(control)?;
        Ok(self.move_doorbells(bar)?)
    }

    fn config_interrupt(&self) {
        let vector = self.registers.lock().config_vector();
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.msix.lock().raise(vector);
    }

    /// The device was reset: nothing of before it is left.
    pub(super) fn forget(&self) {
        self.kicks.iter().for_each(|kick| drop(kick.read()));
        self.isr.store(0, Ordering::SeqCst);
        self.msix.lock().forget_pending();
        // The driver goes on when it sees this.
        self.registers.lock().reset();
    }

    /// Has KVM turn writes to the doorbells into kicks, wherever they are now.
    fn move_doorbells(&self, to: Option<u64>) -> Result<(), Errno> {
        let mut at = self.doorbells.lock();
        if *at == to {
            return Ok(());
        }
        for (from, on) in [(at.take(), false), (to, true)] {
            let Some(bar) = from else {
                continue;
            };
            let doorbells = (bar + NOTIFY.start..).step_by(STRIDE as usize);
            for (kick, gpa) in self.kicks.iter().zip(doorbells) {
                // A place that cannot be had, because another device's doorbells are there, is one with exits.
                let _ = self.hypervisor.set_doorbell(kick, gpa, on);
            }
        }
        *at = to;
        Ok(())
    }

    /// Whether the driver lets it read and write memory.
    pub(super) fn is_master(&self) -> bool {
        self.config.lock().u16(COMMAND) & BUS_MASTER != 0
    }

    /// Has the device's thread look at every queue.
    pub(super) fn ring_all(&self) -> Result<(), Failure> {
        Ok(self.kicks.iter().try_for_each(|kick| kick.write(1))?)
    }

    /// The part of BAR 0 that the configuration space's window shows.
    fn window(&self) -> Option<(u64, usize)> {
        let config = self.config.lock();
        let offset = u64::from(config.u32(self.window_at + WINDOW_OFFSET));
        let length = config.u32(self.window_at + WINDOW_LENGTH);
        let sound = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length.into()) && offset < BAR_SIZE;
        sound.then_some((offset, length as usize))
    }
}

/// Where BAR 0 is, if it is in the window: anywhere else are memory and what KVM itself answers.
fn place(config: &Config) -> Option<u64> {
    config
        .bar()
        .filter(|bar| WINDOW.start <= *bar && bar + BAR_SIZE <= WINDOW.end)
}

/// The configuration space, and the offsets of the MSI-X capability and of the window.
fn configuration(device: &dyn Device, address: u32, vectors: usize) -> (Config, usize, usize) {
    let mut config = Config::new(&Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE_ID + device.id(),
        revision: 1,
        class: u32::from(device.class()) << 8,
        subsystem_vendor: VENDOR,
        subsystem: FIRST_DEVICE_ID + device.id(),
    });
    config.set_bar(address, BAR_SIZE as u32);
    let mut add = |kind: u8, part: &Range<u64>, more: &[u8]| {
        let len = (16 + more.len()) as u8;
        let mut body = vec![len, kind, 0, 0, 0, 0];
        body.extend((part.start as u32).to_le_bytes());
        body.extend(((part.end - part.start) as u32).to_le_bytes());
        body.extend(more);
        config.add_capability(VENDOR_CAPABILITY, &body)
    };
    add(1, &COMMON, &[]);
    add(2, &NOTIFY, &(STRIDE as u32).to_le_bytes());
    add(3, &ISR, &[]);
    add(4, &DEVICE, &[]);
    let window = add(5, &(0..0), &[0; 4]);
    config.allow(window + WINDOW_OFFSET, &[0xff; 8]);
    let mut body = Vec::from((vectors as u16 - 1).to_le_bytes());
    body.extend((TABLE as u32).to_le_bytes());
    body.extend((PENDING as u32).to_le_bytes());
    let msix = config.add_capability(MSIX_CAPABILITY, &body);
    let control = msix::ENABLE | msix::FUNCTION_MASK;
    config.allow(msix + MSIX_CONTROL, &control.to_le_bytes());
    (config, msix, window)
}

impl Function for VirtioFunction {
    fn read_config(&self, at: usize, into: &mut [u8]) {
        self.config.lock().read(at, into);
        if at == self.window_at + WINDOW_DATA
            && let Some((offset, length)) = self.window()
            && let Some(data) = into.get_mut(..length)
        {
            // The bytes of an access are all there are: one that fails leaves ones.
            let _ = self.read(offset, data);
        }
    }

    fn write_config(&self, at: usize, from: &[u8]) -> Result<(), Failure> {
        let mut config = self.config.lock();
        let was_master = config.u16(COMMAND) & BUS_MASTER != 0;
        config.write(at, from);
        let becomes_master = !was_master && config.u16(COMMAND) & BUS_MASTER != 0;
        self.place(&config)?;
        drop(config);
        if becomes_master {
            self.wake.write(1)?;
            self.ring_all()?;
        }
        if at == self.window_at + WINDOW_DATA
            && let Some((offset, length)) = self.window()
            && let Some(data) = from.get(..length)
        {
            self.write(offset, data)?;
        }
        Ok(())
    }

    fn registers(&self) -> Option<Range<u64>> {
        let start = place(&self.config.lock())?;
        Some(start..start + BAR_SIZE)
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Failure> {
        into.fill(0);
        if COMMON.contains(&offset) {
            let generation = self.space.lock().generation;
            self.registers.lock().read(offset, into, generation);
        } else if offset == ISR.start {
            // Reading it clears it.
            into[0] = self.isr.swap(0, Ordering::SeqCst);
        } else if DEVICE.contains(&offset) {
            let space = self.space.lock();
            let rest = space.bytes.get((offset - DEVICE.start) as usize..);
            let rest = rest.unwrap_or_default();
            into.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        } else if (TABLE..PENDING).contains(&offset) {
            self.msix.lock().read(offset - TABLE, into);
        } else if offset >= PENDING {
            self.msix.lock().read_pending(offset - PENDING, into);
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Failure> {
        if COMMON.contains(&offset) {
            let after = self.registers.lock().write(offset, from);
            if after == After::Wake {
                self.wake.write(1)?;
            }
        } else if DEVICE.contains(&offset) {
            self.device.write_config((offset - DEVICE.start) as usize, from)?;
        } else if NOTIFY.contains(&offset) {
            // Where KVM does not do it: through the other view, or through the window.
            if let Some(kick) = self.kicks.get(((offset - NOTIFY.start) / STRIDE) as usize) {
                kick.write(1)?;
            }
        } else if (TABLE..PENDING).contains(&offset) {
            self.msix.lock().write(offset - TABLE, from)?;
        }
        Ok(())
    }
}
