//! A device's queue: rings, descriptors and buffers that the input makes up, in memory of which some is private.

use arbitrary::{Result, Unstructured};
use pagegate_core::memory::address::{PAGE_SIZE, State};

use crate::driver::{BIT, EVENT_IDX, Host, USUAL, Virtio, status};
use crate::rings::{AVAILABLE, DESCRIPTORS, USED, descriptor};
use crate::virtio::{PAGES, SIZE, START, check, fill};

/// Where the input's bytes are that are no rings: tables and the buffers of requests.
const BYTES: u64 = START + 8 * PAGE_SIZE;
/// How often the driver looks whether the device is done, at most.
const LOOKS: usize = 64;

/// What the driver does: the states of pages, the queue, and memory.
struct Driver {
    private: u64,
    size: u16,
    features: u64,
    places: [u64; 3],
    memory: Vec<u8>,
    /// Pages that are converted to private and back while the device is at work.
    converted: Option<u64>,
}

/// A device with two queues: the input's first byte says which one is driven. The other one is not enabled.
pub fn run_one_of_two(data: &[u8], host: &Host, device: &Virtio<'_>) -> bool {
    let Some((which, data)) = data.split_first() else {
        return false;
    };
    run_at(data, host, device, u16::from(which % 2))
}

/// Whether the device completed a request.
pub fn run(data: &[u8], host: &Host, device: &Virtio<'_>) -> bool {
    run_at(data, host, device, 0)
}

fn run_at(data: &[u8], host: &Host, device: &Virtio<'_>, queue: u16) -> bool {
    let Ok(driver) = Driver::of(&mut Unstructured::new(data)) else {
        return false;
    };
    let allowed = fill(host, &driver.memory, driver.private);
    let completed = allowed && driver.drive(host, device, queue);
    if allowed {
        check(host, driver.private);
    }
    completed
}

impl Driver {
    fn of(data: &mut Unstructured<'_>) -> Result<Self> {
        let mut private = data.arbitrary::<u64>()?;
        if data.arbitrary()? {
            private &= data.arbitrary::<u64>()?;
        }
        let size = 1 << data.int_in_range(0..=6)?;
        let features = if data.arbitrary()? { EVENT_IDX } else { 0 } | USUAL;
        let mut places = [DESCRIPTORS, AVAILABLE, USED];
        for place in &mut places {
            match data.arbitrary::<u8>()? {
                0 => *place = data.arbitrary()?,
                1 => *place = START + data.int_in_range(0..=SIZE - 1)?,
                2 => *place |= 1 << BIT,
                // That a page is private at all is no rarity.
                _ => private &= !(1 << ((*place - START) / PAGE_SIZE)),
            }
        }
        let converted = if data.arbitrary()? {
            Some(data.int_in_range(0..=PAGES - 1)?)
        } else {
            None
        };
        let mut memory = vec![0; SIZE as usize];
        let mut put = |gpa: u64, bytes: &[u8]| {
            let at = (gpa - START) as usize;
            memory[at..at + bytes.len()].copy_from_slice(bytes);
        };
        let (index, heads): (u16, [u8; 8]) = data.arbitrary()?;
        put(AVAILABLE + 2, &(index % (2 * size + 1)).to_le_bytes());
        for (head, at) in heads.iter().zip((AVAILABLE + 4..).step_by(2)) {
            put(at, &u16::from(*head).to_le_bytes());
        }
        for index in 0..data.int_in_range(0..=size.min(16))? {
            put(DESCRIPTORS + u64::from(index) * 16, &any_descriptor(data)?);
        }
        let entries = data.int_in_range(0..=8_u64)?;
        for index in 0..entries {
            put(BYTES + index * 16, &any_descriptor(data)?);
        }
        let rest = data.len().min(4 * PAGE_SIZE as usize);
        put(BYTES + entries * 16, data.bytes(rest)?);
        Ok(Self {
            private,
            size,
            features,
            places,
            memory,
            converted,
        })
    }

    fn drive(&self, host: &Host, device: &Virtio<'_>, queue: u16) -> bool {
        assert_ne!(device.negotiate(self.features) & status::FEATURES_OK, 0);
        device.set_up(queue, self.size, self.places);
        device.drive();
        if let Some(page) = self.converted.filter(|page| self.private >> page & 1 == 0) {
            for to in [State::Private, State::Shared] {
                host.convert(START + page * PAGE_SIZE, to);
            }
        }
        let used = self.places[2];
        let readable =
            (START..START + SIZE - 4).contains(&used) && self.private >> ((used - START) / PAGE_SIZE) & 1 == 0;
        let index = |gpa: u64| readable.then(|| host.read(gpa + 2, 2));
        let offered = self.memory[(AVAILABLE + 2 - START) as usize..][..2].to_vec();
        for _ in 0..LOOKS {
            if device.status() & status::NEEDS_RESET != 0 || index(used).as_ref() == Some(&offered) {
                break;
            }
        }
        device.reset();
        index(used).is_some_and(|index| index != [0, 0])
    }
}

/// A descriptor that is mostly of memory that the input fills in, and mostly short.
fn any_descriptor(data: &mut Unstructured<'_>) -> Result<[u8; 16]> {
    let gpa = match data.arbitrary::<u8>()? {
        0 => data.arbitrary()?,
        1 => (START + data.int_in_range(0..=SIZE - 1)?) | 1 << BIT,
        2..=127 => BYTES + u64::from(data.arbitrary::<u8>()?) * 16,
        _ => START + data.int_in_range(0..=SIZE - 1)?,
    };
    let len = match data.arbitrary::<u8>()? {
        0 => data.arbitrary()?,
        1..=63 => 1 << data.int_in_range(0..=13)?,
        64..=127 => 16,
        128..=191 => 1,
        _ => u32::from(data.arbitrary::<u8>()?) * 16,
    };
    let flags = data.arbitrary::<u8>()? & 7;
    Ok(descriptor(gpa, len, flags.into(), data.arbitrary::<u8>()?.into()))
}
