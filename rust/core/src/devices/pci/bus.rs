//! The bus: who is asked for a configuration access, and who for an access in the window.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::config::{Config, Identity};
use crate::devices::bus::{IoHandler, MmioHandler};
use crate::error::{Error, Failure};
use crate::hypervisor::exit::{Io, Mmio};

/// Where devices have their registers: in the hole below 4 GiB.
pub const WINDOW: Range<u64> = 0xc000_0000..0xe000_0000;
/// The port of the address of a configuration access. The three ports after it are not its own: the second is reset control.
pub const ADDRESS_PORT: u16 = 0xcf8;
/// The ports of its data.
pub const DATA_PORTS: RangeInclusive<u16> = 0xcfc..=0xcff;
/// Devices on a bus.
const DEVICES: usize = 32;
/// Bytes of the window that each device gets; more than its BAR needs.
const SHARE: u64 = 1 << 20;

/// Address: this is a configuration access.
const ENABLE: u32 = 1 << 31;
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// A device on the bus. Its methods are called on vCPU threads, several at once.
pub(crate) trait Function: Send + Sync {
    fn read_config(&self, at: usize, into: &mut [u8]);
    fn write_config(&self, at: usize, from: &[u8]) -> Result<(), Failure>;
    /// Where its registers are now, if anywhere.
    fn registers(&self) -> Option<Range<u64>>;
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Failure>;
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Failure>;
}

/// The bus. Register it on its ports and its window.
pub(crate) struct PciBus {
    address: Mutex<u32>,
    host_bridge: Config,
    /// From device 1 on.
    devices: RwLock<Vec<Arc<dyn Function>>>,
}

impl PciBus {
    pub(crate) fn new() -> Self {
        Self {
            address: Mutex::new(0),
            host_bridge: Config::new(&HOST_BRIDGE),
            devices: RwLock::default(),
        }
    }

    /// Adds the device that `make` makes of its number and of where its registers are to be.
    ///
    /// # Errors
    /// Those of `make`; `Invalid` if the bus is full.
    pub(crate) fn add<T: Function + 'static>(
        &self,
        make: impl FnOnce(u32, u32) -> Result<Arc<T>, Error>,
    ) -> Result<Arc<T>, Error> {
        let mut devices = self.devices.write();
        let number = devices.len() + 1;
        if number == DEVICES {
            return Err(Error::Invalid(format!("a machine has {} devices at most", DEVICES - 1)));
        }
        let device = make(number as u32, (WINDOW.start + SHARE * number as u64) as u32)?;
        devices.push(device.clone());
        Ok(device)
    }

    /// The address of the next configuration access.
    pub(crate) fn address(&self) -> u32 {
        *self.address.lock()
    }

    /// Sets that, for a machine that is resumed.
    pub(crate) fn set_address(&self, address: u32) {
        *self.address.lock() = address;
    }

    /// Removes all devices.
    pub(crate) fn clear(&self) {
        let devices = std::mem::take(&mut *self.devices.write());
        // Not with the lock held: it may run Python code.
        drop(devices);
    }

    /// Reads or writes configuration space; `None` where there is no device.
    fn config(&self, address: u32, at: usize, write: bool, data: &mut [u8]) -> Result<(), Failure> {
        let (bus, device, function) = (address >> 16 & 0xff, (address >> 11 & 0x1f) as usize, address >> 8 & 7);
        let at = (address & 0xfc) as usize + at;
        if !write {
            data.fill(0xff);
        }
        if address & ENABLE == 0 || bus != 0 || function != 0 {
            return Ok(());
        }
        if device == 0 {
            if !write {
                self.host_bridge.read(at, data);
            }
            return Ok(());
        }
        // Not with the lock: a write can move the device's registers, which takes a system call.
        let Some(device) = self.devices.read().get(device - 1).cloned() else {
            return Ok(());
        };
        match write {
            true => device.write_config(at, data),
            false => {
                device.read_config(at, data);
                Ok(())
            }
        }
    }
}

impl IoHandler for PciBus {
    fn io(&self, _vcpu: u32, io: &Io, data: &mut [u8]) -> Result<(), Failure> {
        for access in data.chunks_mut(usize::from(io.size.max(1))) {
            if DATA_PORTS.contains(&io.port) {
                let address = *self.address.lock();
                self.config(address, usize::from(io.port - DATA_PORTS.start()), io.write, access)?;
                continue;
            }
            let mut address = self.address.lock();
            match (<[u8; 4]>::try_from(&*access), io.write) {
                (Ok(bytes), true) => *address = u32::from_le_bytes(bytes),
                (Ok(_), false) => access.copy_from_slice(&address.to_le_bytes()),
                // Only a whole access is one to this register.
                (Err(_), true) => {}
                (Err(_), false) => access.fill(0xff),
            }
        }
        Ok(())
    }
}

impl MmioHandler for PciBus {
    fn mmio(&self, _vcpu: u32, mmio: &Mmio, data: &mut [u8]) -> Result<(), Failure> {
        let end = mmio.gpa + data.len() as u64;
        let holds = |at: &Range<u64>| at.start <= mmio.gpa && end <= at.end;
        let found = self.devices.read().iter().find_map(|device| {
            let at = device.registers().filter(holds)?;
            Some((device.clone(), mmio.gpa - at.start))
        });
        match found {
            Some((device, offset)) if mmio.write => device.write(offset, data),
            Some((device, offset)) => device.read(offset, data),
            None if mmio.write => Ok(()),
            None => {
                data.fill(0xff);
                Ok(())
            }
        }
    }
}
