//! A console, hvc0 in Linux: one port, with a [`Console`] at its other end.

use std::os::fd::AsFd;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::device::{Device, Source};
use super::queue::{Queue, total};
use super::wake::Wake;
use crate::devices::console::Console;
use crate::error::{Error, Failure};

const QUEUE: u16 = 64;
/// The queue of buffers for input; the other one has output.
const INPUT: usize = 0;
/// The most bytes that one request takes. Linux writes a page at most; of output that is longer the rest is dropped.
const MOST: u64 = 64 << 10;

/// virtio-console with one port.
pub struct VirtioConsole {
    console: Arc<Console>,
    /// There is input.
    input: Arc<Wake>,
}

impl VirtioConsole {
    /// The guest's end of a console.
    ///
    /// # Errors
    /// `Invalid` if the console has a device already; those of eventfd(2).
    pub fn new(console: Arc<Console>) -> Result<Self, Error> {
        let input = Arc::new(Wake::new()?);
        let wake = input.clone();
        console.on_input(Box::new(move || wake.ring()))?;
        Ok(Self { console, input })
    }

    /// Moves input into the guest's buffers, until one of the two runs out. Input that could not be written, since the
    /// driver gave memory that is not shared, stays for the next buffer.
    fn give_input(&self, queue: &mut Queue) {
        self.input.clear();
        let mut bytes = [0; 4096];
        loop {
            let available = self.console.peek_input(&mut bytes);
            if available == 0 {
                return;
            }
            let Some(request) = queue.take() else {
                return;
            };
            let part = &mut bytes[..available.min(total(request.writable()).min(MOST) as usize)];
            let written = match request.write(0, part).and_then(|()| request.intact()) {
                Ok(()) => self.console.take_input(part),
                Err(_) => 0,
            };
            queue.complete(request, written as u32);
        }
    }

    fn take_output(&self, queue: &mut Queue) {
        while let Some(request) = queue.take() {
            let mut bytes = vec![0; total(request.readable()).min(MOST) as usize];
            if request.read(0, &mut bytes).is_ok() {
                self.console.append_output(&bytes);
            }
            queue.complete(request, 0);
        }
    }
}

impl Drop for VirtioConsole {
    /// Nothing more is written, and nobody waits for it.
    fn drop(&mut self) {
        self.console.close();
    }
}

impl Device for VirtioConsole {
    fn id(&self) -> u16 {
        3
    }

    fn class(&self) -> u16 {
        0x0780
    }

    fn queues(&self) -> &[u16] {
        &[QUEUE; 2]
    }

    /// Its fields belong to features that are not offered.
    fn config(&self) -> Result<Vec<u8>, Failure> {
        Ok(vec![0; 12])
    }

    fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure> {
        let queue = &mut queues[index];
        match index {
            INPUT => self.give_input(queue),
            _ => self.take_output(queue),
        }
        Ok(())
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source {
            fd: self.input.as_fd(),
            events: EventSet::IN,
            queue: INPUT,
        }]
    }
}
