//! Accesses of configuration space and of BAR 0, in any order, width and place.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arbitrary::{Result, Unstructured};
use pagegate_core::devices::pci::bus::WINDOW;
use pagegate_core::devices::virtio::block::Block;
use pagegate_core::devices::virtio::rng::Rng;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::driver::{Host, Virtio};
use crate::virtio::{self, SIZE, START};

const COMMAND: u64 = 0x04;
const BAR: u64 = 0x10;
/// What each device is: its vendor and type.
const IDENTITIES: [u64; 3] = [0x0008_1b36, 0x1042_1af4, 0x1044_1af4];
/// The pages of inputs' memory that are private.
const PRIVATE: u64 = 0xf0f0_f0f0_f0f0_f0f0;
/// The most accesses of an input.
const MOST: usize = 64;

/// Accesses until the input is used up. Whether there was any.
pub fn run(data: &[u8]) -> bool {
    static DEVICES: OnceLock<Mutex<[Virtio<'static>; 2]>> = OnceLock::new();
    let devices = DEVICES.get_or_init(|| Mutex::new(devices()));
    let devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
    let host = devices[0].host;
    virtio::fill(host, &vec![0; SIZE as usize], PRIVATE);
    let mut data = Unstructured::new(data);
    let mut accesses = 0;
    while accesses < MOST && access(host, &devices, &mut data).is_ok_and(|more| more) {
        accesses += 1;
    }
    let window = |doorbell: &u64| WINDOW.contains(doorbell);
    assert!(host.fake.doorbells().iter().all(window), "{:x?}", host.fake.doorbells());
    for device in devices.iter() {
        look_at(host, device.number);
        // Off the bus, so that none is in the other's place.
        host.set_config(device.number, COMMAND, &[0; 2]);
    }
    for device in devices.iter() {
        put_back(host, device);
    }
    assert_eq!(host.fake.doorbells().len(), devices.len());
    virtio::check(host, PRIVATE);
    accesses > 0
}

fn devices() -> [Virtio<'static>; 2] {
    let file = std::fs::File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("memory for a disk"));
    file.set_len(64 * 512).expect("memory for a disk");
    let host = virtio::host(vec![Arc::new(Block::new(file, false).expect("a disk")), Arc::new(Rng)]);
    [1, 2].map(|number| Virtio::find(host, number))
}

/// One access. `false` once there is nothing left to make one of.
fn access(host: &Host, devices: &[Virtio<'_>; 2], data: &mut Unstructured<'_>) -> Result<bool> {
    if data.is_empty() {
        return Ok(false);
    }
    let kind = data.arbitrary::<u8>()?;
    let device = data.int_in_range(0..=3_u32)?;
    let registers = &devices[device as usize % 2];
    match kind % 8 {
        0 => {
            let at = data.arbitrary::<u8>()?;
            let len = 1 << data.int_in_range(0..=2)?;
            host.config(device, at.into(), len);
        }
        1 => host.set_config(device, data.arbitrary::<u8>()?.into(), &bytes(data)?),
        2 => {
            let bar = WINDOW.start + u64::from(data.arbitrary::<u16>()?) * 0x1000;
            host.set_config(device, BAR, &(bar as u32).to_le_bytes());
        }
        3 => {
            let port = *data.choose(&[0xcf8, 0xcfc, 0xcfd, 0xcfe, 0xcff])?;
            host.port_out(port, &bytes(data)?);
        }
        // The common registers, with values and widths that fit or not.
        4 | 5 => {
            let at = data.int_in_range(0..=0x3f_u8)?;
            host.store(registers.common + u64::from(at), &bytes(data)?);
        }
        6 => host.store(registers.bar + data.int_in_range(0..=0x8007_u64)?, &any_bytes(data)?),
        _ => {
            let at = data.int_in_range(0..=0x8007_u64)?;
            host.load(registers.bar + at, data.int_in_range(1..=8)?);
        }
    }
    Ok(true)
}

/// 1, 2 or 4 bytes: often a place in memory or a small number.
fn bytes(data: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let value = match data.arbitrary::<u8>()? % 4 {
        0 => data.arbitrary::<u32>()?,
        1 => (START + data.int_in_range(0..=SIZE)?) as u32 & !0xff,
        _ => data.arbitrary::<u8>()?.into(),
    };
    let len = 1 << data.int_in_range(0..=2)?;
    Ok(value.to_le_bytes()[..len].to_vec())
}

fn any_bytes(data: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let value = data.arbitrary::<u64>()?.to_le_bytes();
    Ok(value[..data.int_in_range(1..=8)?].to_vec())
}

/// Checks that a device is what it was.
fn look_at(host: &Host, number: u32) {
    for (number, identity) in (0..).zip(IDENTITIES) {
        assert_eq!(host.config(number, 0, 4), identity);
    }
    assert_eq!(host.config(number, BAR, 4) % 0x8000, 0);
    assert_eq!(host.config(number, COMMAND, 2) & !0x406, 0);
}

fn put_back(host: &Host, device: &Virtio<'_>) {
    let number = device.number;
    host.set_config(number, device.msix + 2, &[0; 2]);
    host.set_config(number, BAR, &(device.bar as u32).to_le_bytes());
    host.set_config(number, COMMAND, &6_u16.to_le_bytes());
    device.reset();
}
