//! The threads of devices: each device of a PC has one for as long as the machine runs.

use std::sync::Arc;
use std::thread::{Builder, Scope, ScopedJoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::assembly::Machine;
use crate::devices::virtio::function::VirtioFunction;
use crate::devices::virtio::run::{Accesses, Spawn};
use crate::errno::Errno;
use crate::error::{Error, Failure};
use crate::memory::missing::{DEVICE_THREAD, HELPER_THREAD};
use crate::vcpu::control::{Control, POLL};

/// Ends the threads and waits for them, when dropped.
pub(super) struct DeviceThreads<'scope> {
    threads: Vec<(Arc<EventFd>, ScopedJoinHandle<'scope, ()>)>,
}

impl DeviceThreads<'_> {
    fn tell(&self) {
        for (end, _) in &self.threads {
            // It cannot be full: it is written to twice at most.
            let _ = end.write(1);
        }
    }

    /// Ends the threads and waits for them. `interrupt` is called every 25 ms: a device may be doing something that takes long.
    pub(super) fn end(self, control: &Control, interrupt: &mut dyn FnMut() -> Result<(), Failure>) {
        self.tell();
        let mut pause = Duration::from_micros(50);
        while self.threads.iter().any(|(_, thread)| !thread.is_finished()) {
            std::thread::sleep(pause);
            pause = (pause * 2).min(POLL);
            if pause == POLL
                && let Err(failure) = interrupt()
            {
                control.finish(Err(Error::Interrupted(failure)));
            }
        }
    }
}

/// A panic of a device's thread stops the run.
struct Ended<'a>(&'a Control);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop("stopped");
        }
    }
}

impl Drop for DeviceThreads<'_> {
    fn drop(&mut self) {
        self.tell();
        for (_, thread) in self.threads.drain(..) {
            if let Err(panic) = thread.join()
                && !std::thread::panicking()
            {
                std::panic::resume_unwind(panic);
            }
        }
    }
}

impl Machine {
    /// What the end of the run in progress waits for: devices for which the host does something, and what that is.
    pub fn waits_for(&self) -> Vec<(Arc<str>, &'static str)> {
        let devices = self
            .pc
            .as_ref()
            .filter(|_| self.current.ending())
            .map(|pc| pc.devices());
        let mut waits = Vec::new();
        for device in devices.into_iter().flatten() {
            let what = device.device.under_way();
            waits.extend(what.map(|what| (device.name.name.clone(), what)));
        }
        waits
    }

    /// Starts a thread for each device. One that cannot be started ends the run.
    pub(super) fn start_devices<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        control: &'env Arc<Control>,
        stack: usize,
        accesses: &'env Arc<Accesses>,
    ) -> DeviceThreads<'scope> {
        let devices = self.pc.as_ref().map_or_else(Vec::new, |pc| pc.devices());
        let mut threads = Vec::new();
        for device in devices {
            match self.start_device(scope, control, stack, accesses, device) {
                Ok(thread) => threads.push(thread),
                Err(errno) => {
                    let what = "start a device's thread";
                    control.finish(Err(Error::Host { what, errno }));
                    break;
                }
            }
        }
        DeviceThreads { threads }
    }

    fn start_device<'scope, 'env>(
        &'env self,
        scope: &'scope Scope<'scope, 'env>,
        control: &'env Arc<Control>,
        stack: usize,
        accesses: &'env Arc<Accesses>,
        device: Arc<VirtioFunction>,
    ) -> Result<(Arc<EventFd>, ScopedJoinHandle<'scope, ()>), Errno> {
        let end = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let watched = end.clone();
        let spawn = self.helper_threads(control, stack);
        let body = move || self.device_thread(control, accesses, spawn, &device, &watched);
        let name = DEVICE_THREAD.to_owned();
        let thread = Builder::new().name(name).stack_size(stack).spawn_scoped(scope, body)?;
        Ok((end, thread))
    }

    /// What starts further threads of devices, which are as their own.
    fn helper_threads(&self, control: &Arc<Control>, stack: usize) -> Arc<Spawn> {
        let (control, around) = (control.clone(), self.around.clone());
        Arc::new(move |body| {
            let (control, around) = (control.clone(), around.clone());
            let mut body = Some(body);
            let mut once = move || body.take().map_or((), |body| body());
            let thread = Builder::new().name(HELPER_THREAD.to_owned()).stack_size(stack);
            thread.spawn(move || {
                let _ended = Ended(&control);
                match &around {
                    Some(around) => around(&mut once),
                    None => once(),
                }
            })
        })
    }

    fn device_thread(
        &self,
        control: &Arc<Control>,
        accesses: &Arc<Accesses>,
        spawn: Arc<Spawn>,
        device: &VirtioFunction,
        end: &EventFd,
    ) {
        let _ended = Ended(control);
        let Some(pc) = &self.pc else {
            return;
        };
        let mut body = || device.work(self.devices_run(pc, control.clone(), accesses, spawn.clone()), end);
        match &self.around {
            Some(around) => around(&mut body),
            None => body(),
        }
    }
}
