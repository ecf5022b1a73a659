//! What a PC has around its vCPUs: the serial port with its console, and the ports by which a guest ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::current::Current;
use super::snapshot::manifest::SavedPc;
use crate::boot::running_kernel::RunningKernel;
use crate::devices::bus::Bus;
use crate::devices::console::{Console, DEFAULT_OUTPUT_LIMIT};
use crate::devices::dma::InFlight;
use crate::devices::pci;
use crate::devices::pci::bus::PciBus;
use crate::devices::pci::messages::Messages;
use crate::devices::power::Power;
use crate::devices::serial::Serial;
use crate::devices::virtio::device::Device;
use crate::devices::virtio::function::VirtioFunction;
use crate::devices::virtio::run::Name;
use crate::error::Error;
use crate::hypervisor::vm::Hypervisor;
use crate::memory::views::Views;

/// The most bytes of a device's own configuration space.
const LARGEST_SPACE: usize = 4096;

/// The devices of a PC.
pub(super) struct Pc {
    pub console: Arc<Console>,
    /// The kernel that was booted.
    pub kernel: Mutex<Option<Arc<RunningKernel>>>,
    hypervisor: Arc<dyn Hypervisor>,
    serial: Arc<Serial>,
    messages: Arc<Messages>,
    pci: Arc<PciBus>,
    devices: Mutex<Vec<Arc<VirtioFunction>>>,
    /// The PCI bus has its ports and addresses.
    on_bus: AtomicBool,
    /// The pages of requests that devices work on; a listener once there is a device.
    pub in_flight: Arc<InFlight>,
}

impl Pc {
    /// Creates them on the bus. A guest that powers off or reboots ends the run in progress.
    pub(super) fn new(hypervisor: &Arc<dyn Hypervisor>, bus: &Bus, current: &Arc<Current>) -> Result<Self, Error> {
        let what = "create the serial port's interrupt";
        let failed = |errno| Error::Host { what, errno };
        let interrupt = EventFd::new(EFD_NONBLOCK).map_err(|error| failed(error.into()))?;
        hypervisor.route_interrupt(&interrupt, Serial::IRQ).map_err(failed)?;
        let console = Arc::new(Console::new(DEFAULT_OUTPUT_LIMIT));
        let serial = Serial::new(console.clone(), interrupt)?;
        for port in Serial::PORTS {
            bus.on_io(port, serial.clone())?;
        }
        let current = current.clone();
        let power = Arc::new(Power::new(Box::new(move |reason| current.stop(reason))));
        for port in Power::PORTS {
            bus.on_io(port, power.clone())?;
        }
        Ok(Self {
            console,
            kernel: Mutex::default(),
            hypervisor: hypervisor.clone(),
            serial,
            messages: Arc::new(Messages::new(hypervisor.clone())),
            pci: Arc::new(PciBus::new()),
            devices: Mutex::default(),
            on_bus: AtomicBool::new(false),
            in_flight: Arc::default(),
        })
    }

    /// Puts a device on the PCI bus, and the bus on its ports and addresses with the first one. Returns whether it is the
    /// first.
    pub(super) fn add(
        &self,
        name: &str,
        device: Arc<dyn Device>,
        logs_accesses: bool,
        bus: &Bus,
        views: &Views,
    ) -> Result<bool, Error> {
        // Without the lock: it may call Python.
        let space = space_of(name, device.as_ref())?;
        let mut devices = self.devices.lock();
        let first = devices.is_empty();
        let make = |number, address| {
            let name = Name {
                name: name.into(),
                number,
                logs_accesses,
            };
            let (messages, hypervisor) = (self.messages.clone(), self.hypervisor.clone());
            VirtioFunction::new(name, device, space, address, messages, hypervisor).map(Arc::new)
        };
        if !self.on_bus.load(Ordering::Relaxed) {
            self.register(bus, views)?;
            self.on_bus.store(true, Ordering::Relaxed);
        }
        devices.push(self.pci.add(make)?);
        Ok(first)
    }

    /// Reads the configuration spaces of the devices of this name again, and tells the drivers of those that changed.
    pub(super) fn refresh(&self, name: &str) -> Result<(), Error> {
        let mut devices = self.devices();
        devices.retain(|device| *device.name.name == *name);
        if devices.is_empty() {
            return Err(Error::Invalid(format!("there is no device called {name}")));
        }
        for device in devices {
            let refresh = device.refresh_begins();
            device.set_space(refresh, space_of(name, device.device.as_ref())?);
        }
        Ok(())
    }

    /// Its state, between runs.
    pub(super) fn save(&self) -> Result<SavedPc, Error> {
        let what = "read the interrupt controllers";
        let devices = self
            .devices()
            .iter()
            .map(|device| device.save())
            .collect::<Result<_, _>>()?;
        let controllers = self.hypervisor.controllers();
        Ok(SavedPc {
            controllers: controllers.map_err(|errno| Error::Host { what, errno })?,
            serial: self.serial.save(),
            pci_address: self.pci.address(),
            devices,
        })
    }

    /// Resets all devices, between runs.
    pub(super) fn reset(&self) -> Result<(), Error> {
        self.devices().iter().try_for_each(|device| device.reset())
    }

    /// Whether there are as many devices as in a state that was saved.
    pub(super) fn check(&self, saved: &SavedPc) -> Result<(), Error> {
        let devices = self.devices();
        if devices.len() != saved.devices.len() {
            let list = |names: Vec<&str>| match names.is_empty() {
                true => "none".to_owned(),
                false => names.join(", "),
            };
            let was = list(saved.devices.iter().map(|device| device.name.as_str()).collect());
            let is = list(devices.iter().map(|device| &*device.name.name).collect());
            return Err(Error::Invalid(format!(
                "the devices of the snapshot were: {was}; give as many, in this order (given: {is})"
            )));
        }
        devices
            .iter()
            .zip(&saved.devices)
            .try_for_each(|(device, saved)| device.check(saved))
    }

    /// Takes a state that was saved: before the first run, or after [`reset`](Self::reset).
    pub(super) fn restore(&self, saved: SavedPc) -> Result<(), Error> {
        self.check(&saved)?;
        let devices = self.devices();
        let what = "set the interrupt controllers";
        let set = self.hypervisor.set_controllers(&saved.controllers);
        set.map_err(|errno| Error::Host { what, errno })?;
        self.pci.set_address(saved.pci_address);
        for (device, saved) in devices.iter().zip(saved.devices) {
            device.restore(saved)?;
        }
        self.serial.restore(saved.serial)
    }

    /// Drops all devices, which may hold references to the object that owns the machine.
    pub(super) fn close(&self) {
        self.console.close();
        let devices = std::mem::take(&mut *self.devices.lock());
        self.pci.clear();
        drop(devices);
    }

    /// Puts the PCI bus on its ports and addresses.
    fn register(&self, bus: &Bus, views: &Views) -> Result<(), Error> {
        let window = pci::bus::WINDOW;
        bus.on_mmio(window.start, window.end - window.start, views, self.pci.clone())?;
        for port in [pci::bus::ADDRESS_PORT].into_iter().chain(pci::bus::DATA_PORTS) {
            bus.on_io(port, self.pci.clone())?;
        }
        Ok(())
    }

    /// The devices on the PCI bus.
    pub(super) fn devices(&self) -> Vec<Arc<VirtioFunction>> {
        self.devices.lock().clone()
    }
}

fn space_of(name: &str, device: &dyn Device) -> Result<Vec<u8>, Error> {
    let space = device.config().map_err(|failure| Error::Device {
        device: name.into(),
        failure,
    })?;
    match space.len() <= LARGEST_SPACE {
        true => Ok(space),
        false => Err(Error::Invalid(format!(
            "device {name}: its configuration space has {} bytes; there can be {LARGEST_SPACE}",
            space.len()
        ))),
    }
}
