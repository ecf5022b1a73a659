//! A device's thread: it waits for requests, resets and the device's own sources, and ends with the run.
//!
//! Between runs there is none, so nothing reads or writes the guest's memory then. Doorbells that were rung meanwhile are
//! still rung.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno as Cause;
use virtio_queue::Queue as Ring;
use vmm_sys_util::eventfd::EventFd;

use super::device::Source;
use super::function::VirtioFunction;
use super::queue::Queue;
use super::run::{Run, Site};
use crate::error::{Error, Failure};
use crate::hypervisor::raw;

/// What it waits for before the doorbells: the end of the run, and the registers.
const FIRST_KICK: usize = 2;

impl VirtioFunction {
    /// Works until `end` is written to.
    pub(crate) fn work(&self, run: Run, end: &EventFd) {
        let finish = run.end.clone();
        let site = Arc::new(Site {
            run,
            device: self.name.clone(),
            resetting: self.registers.lock().resetting().clone(),
        });
        let mut queues = self.rings.lock().take().map(|rings| in_run(rings, &site));
        let served = self.serve(&site, end, &mut queues);
        if let Some(queues) = &mut queues {
            self.device.settle(queues);
            queues.iter_mut().for_each(|queue| self.tell(queue));
        }
        if let Err(failure) = served {
            let device = self.name.name.clone();
            finish(Err(Error::Device { device, failure }));
        }
        *self.rings.lock() = queues.map(|queues| queues.into_iter().map(Queue::into_ring).collect());
    }

    fn serve(&self, site: &Arc<Site>, end: &EventFd, queues: &mut Option<Vec<Queue>>) -> Result<(), Failure> {
        if queues.is_some() {
            // The last run may have left requests that came while as many as the device can have were under way. The driver
            // has rung for them.
            self.ring_all()?;
        }
        loop {
            self.follow_registers(site, queues)?;
            let sources = match queues {
                Some(_) if self.is_master() => self.device.sources(),
                _ => Vec::new(),
            };
            let ready = self.wait(end, &sources)?;
            if ready.contains(&0) {
                return Ok(());
            }
            if ready.contains(&1) {
                let _ = self.wake.read();
                continue;
            }
            let Some(queues) = queues.as_mut().filter(|_| self.is_master()) else {
                // Doorbells that a driver rings before it is ready. All are rung when it is.
                self.kicks.iter().for_each(|kick| drop(kick.read()));
                continue;
            };
            let to_process: BTreeSet<usize> = ready.iter().filter_map(|at| self.queue_of(*at, &sources)).collect();
            drop(sources);
            for queue in to_process {
                self.process(queues, queue)?;
            }
        }
    }

    /// The queue that something is about which is ready.
    fn queue_of(&self, at: usize, sources: &[Source<'_>]) -> Option<usize> {
        let queue = at.checked_sub(FIRST_KICK)?;
        match self.kicks.get(queue) {
            Some(kick) => {
                let _ = kick.read();
                Some(queue)
            }
            None => sources.get(queue - self.kicks.len()).map(|source| source.queue),
        }
    }

    /// The indices of what is ready: the end of the run, the registers, the doorbells, and after them the sources. By poll(2),
    /// which needs no room for a watch of each.
    fn wait(&self, end: &EventFd, sources: &[Source<'_>]) -> Result<Vec<usize>, Failure> {
        let events = [end, &self.wake].into_iter().chain(&self.kicks);
        let readable = |event| PollFd::from_borrowed_fd(raw::borrowed(event), PollFlags::IN);
        let mut watched: Vec<PollFd<'_>> = events.map(readable).collect();
        watched.extend(sources.iter().map(|source| {
            // The bits of poll(2) and of epoll are the same. Under Miri rustix has them in an i16, else in an u16.
            PollFd::from_borrowed_fd(source.fd, PollFlags::from_bits_truncate(source.events.bits() as _))
        }));
        loop {
            match rustix::event::poll(&mut watched, None) {
                Err(Cause::INTR) => {}
                polled => {
                    polled.map_err(std::io::Error::from)?;
                    break;
                }
            }
        }
        let is_ready = |(at, polled): (usize, &PollFd<'_>)| (!polled.revents().is_empty()).then_some(at);
        Ok(watched.iter().enumerate().filter_map(is_ready).collect())
    }

    /// Starts to use the queues when the driver is ready, and stops when it resets the device.
    fn follow_registers(&self, site: &Arc<Site>, queues: &mut Option<Vec<Queue>>) -> Result<(), Failure> {
        if site.resetting.load(Ordering::SeqCst) {
            self.give_up(queues);
            // Without the lock: it may call Python.
            let reset = self.device.reset();
            self.forget();
            reset?;
        }
        let registers = self.registers.lock();
        if !registers.is_live() {
            drop(registers);
            // The driver has given the device up.
            self.give_up(queues);
            return Ok(());
        }
        if queues.is_some() {
            return Ok(());
        }
        *queues = Some(in_run(registers.rings(), site));
        let features = registers.accepted();
        drop(registers);
        self.device.activate(features)?;
        self.ring_all()
    }

    fn give_up(&self, queues: &mut Option<Vec<Queue>>) {
        if let Some(mut queues) = queues.take() {
            self.device.settle(&mut queues);
        }
    }

    fn process(&self, queues: &mut Vec<Queue>, index: usize) -> Result<(), Failure> {
        for (at, queue) in queues.iter_mut().enumerate() {
            queue.begin_turn(at == index);
        }
        let processed = self.device.process(queues, index);
        for (at, queue) in queues.iter_mut().enumerate() {
            if queue.end_turn(at == index) {
                self.kicks[at].write(1)?;
            }
            self.tell(queue);
        }
        if self.device.config_changed() {
            let refresh = self.refresh_begins();
            self.set_space(refresh, self.device.config()?);
        }
        processed
    }

    /// Tells the driver what became of a queue's requests.
    fn tell(&self, queue: &mut Queue) {
        if queue.wants_interrupt() {
            self.interrupt(queue.index());
        }
        if std::mem::take(&mut queue.broken) {
            self.fail();
        }
    }
}

fn in_run(rings: Vec<Ring>, site: &Arc<Site>) -> Vec<Queue> {
    let queue = |(index, ring)| Queue::new(index, ring, site.clone());
    (0..).zip(rings).map(queue).collect()
}
