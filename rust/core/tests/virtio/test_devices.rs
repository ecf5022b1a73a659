//! Devices and policies for tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pagegate_core::devices::virtio::block::Block;
use pagegate_core::devices::virtio::device::Device;
use pagegate_core::devices::virtio::queue::{Queue, Request};
use pagegate_core::errno::Errno;
use pagegate_core::error::Failure;
use pagegate_core::policy::decision::Decision;
use pagegate_core::policy::device_access::DeviceAccess;
use pagegate_core::policy::hooks::Policy;
use parking_lot::{Condvar, Mutex};

use crate::driver::PATIENCE;

type Answer = Box<dyn Fn(&DeviceAccess) -> Result<Decision, Failure> + Send + Sync>;

/// A policy that answers as the test says, and keeps each access that it was asked about.
pub struct Judge {
    answer: Answer,
    pub asked: Mutex<Vec<DeviceAccess>>,
}

impl Judge {
    pub fn new(answer: impl Fn(&DeviceAccess) -> Result<Decision, Failure> + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            answer: Box::new(answer),
            asked: Mutex::default(),
        })
    }

    pub fn deny() -> Arc<Self> {
        Self::new(|_| Ok(Decision::Deny(Errno(libc::EACCES))))
    }
}

impl Policy for Judge {
    fn device_access(&self, access: &DeviceAccess) -> Result<Decision, Failure> {
        self.asked.lock().push(access.clone());
        (self.answer)(access)
    }
}

/// A disk of so many sectors, each filled with its number. The file is its own second value.
pub fn disk(sectors: u64) -> (Arc<dyn Device>, std::fs::File) {
    let file = std::fs::File::from(rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    for sector in 0..sectors {
        std::os::unix::fs::FileExt::write_all_at(&file, &[sector as u8; 512], sector * 512).unwrap();
    }
    let kept = file.try_clone().unwrap();
    (Arc::new(Block::new(file, false).unwrap()), kept)
}

/// How far a [`Gated`] device may go.
#[derive(Default)]
struct Turnstile {
    taken: usize,
    allowed: usize,
}

/// A device that works on a request only when the test lets it: it fills the first writable buffer, and then writes how that
/// went to the last one.
#[derive(Default)]
pub struct Gated {
    turnstile: Mutex<Turnstile>,
    changed: Condvar,
}

impl Gated {
    pub const FILL: u8 = 0x77;
    pub const DONE: u8 = 1;
    pub const FAILED: u8 = 2;

    /// Waits until it has taken so many requests in all.
    pub fn wait_until_taken(&self, count: usize) {
        let mut turnstile = self.turnstile.lock();
        let waited = self
            .changed
            .wait_while_for(&mut turnstile, |now| now.taken < count, PATIENCE);
        assert!(!waited.timed_out(), "the device does not take its request");
    }

    /// Lets it go on with so many requests in all.
    pub fn allow(&self, count: usize) {
        self.turnstile.lock().allowed = count;
        self.changed.notify_all();
    }

    fn carry_out(request: &Request) -> u8 {
        let Some(first) = request.writable().first() else {
            return Self::FAILED;
        };
        let done = request.write(0, &vec![Self::FILL; first.len as usize]);
        match done.and_then(|()| request.intact()) {
            Ok(()) => Self::DONE,
            Err(_) => Self::FAILED,
        }
    }
}

impl Device for Gated {
    fn id(&self) -> u16 {
        42
    }

    fn queues(&self) -> &[u16] {
        &[16]
    }

    fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure> {
        while let Some(request) = queues[index].take() {
            let mut turnstile = self.turnstile.lock();
            turnstile.taken += 1;
            let mine = turnstile.taken;
            self.changed.notify_all();
            self.changed
                .wait_while_for(&mut turnstile, |now| now.allowed < mine, PATIENCE);
            drop(turnstile);
            let end = pagegate_core::devices::virtio::queue::total(request.writable());
            let told = request.write(end - 1, &[Self::carry_out(&request)]);
            queues[index].complete(request, told.map_or(0, |()| end as u32));
        }
        Ok(())
    }
}

/// A device that takes a while for each request.
#[derive(Default)]
pub struct Slow {
    pub done: AtomicUsize,
    pub resets: AtomicUsize,
}

impl Slow {
    pub const EACH: Duration = Duration::from_millis(20);
    pub const QUEUE: u16 = 256;
}

impl Device for Slow {
    fn id(&self) -> u16 {
        42
    }

    fn queues(&self) -> &[u16] {
        &[Self::QUEUE]
    }

    fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure> {
        while let Some(request) = queues[index].take() {
            std::thread::sleep(Self::EACH);
            self.done.fetch_add(1, Ordering::SeqCst);
            queues[index].complete(request, 0);
        }
        Ok(())
    }

    fn reset(&self) -> Result<(), Failure> {
        self.resets.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
