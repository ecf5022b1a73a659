//! Further threads of a device, which carry out its requests, several at a time. They begin as they are needed, and end with
//! the run or a reset of the device.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::queue::Request;
use super::wake::Wake;
use crate::error::Error;

/// Requests at a time. Each has a thread, so that none waits for another's file.
const MOST: usize = 8;

/// What the threads do.
pub(super) trait CarryOut: Send + Sync + 'static {
    /// Carries out a request. Returns how many bytes were written to its buffers; `None` if it cannot be answered.
    fn carry_out(&self, request: &Request) -> Option<u32>;
}

/// A request that was carried out, with what [`CarryOut::carry_out`] returned.
pub(super) type Done = (Request, Option<u32>);

/// The threads of a device.
pub(super) struct Helpers<T: CarryOut> {
    shared: Arc<Shared<T>>,
    /// Those that were started and not waited for.
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared<T> {
    task: T,
    work: Mutex<Work>,
    changed: Condvar,
    /// Requests were carried out.
    done: Wake,
}

#[derive(Default)]
struct Work {
    /// Requests that were handed over and not returned.
    under_way: usize,
    /// Those that no thread has begun.
    waiting: VecDeque<Request>,
    /// Threads that wait for one, and threads that were started and do not yet.
    idle: usize,
    starting: usize,
    done: Vec<Done>,
    /// The threads are to end.
    ending: bool,
}

impl<T: CarryOut> Helpers<T> {
    /// # Errors
    /// Those of eventfd(2).
    pub(super) fn new(task: T) -> Result<Self, Error> {
        Ok(Self {
            shared: Arc::new(Shared {
                task,
                work: Mutex::default(),
                changed: Condvar::new(),
                done: Wake::new()?,
            }),
            threads: Mutex::default(),
        })
    }

    pub(super) fn task(&self) -> &T {
        &self.shared.task
    }

    /// Whether one more request can be handed over.
    pub(super) fn has_room(&self) -> bool {
        self.shared.work.lock().under_way < MOST
    }

    /// Has a thread carry out a request. Only called by the device's own thread.
    pub(super) fn hand_over(&self, request: Request) {
        let spawn = request.run().spawn.clone();
        let mut threads = self.threads.lock();
        let mut work = self.shared.work.lock();
        work.under_way += 1;
        work.waiting.push_back(request);
        // As many threads as there may be requests are enough, also if one has not got to waiting for the next.
        if work.waiting.len() <= work.idle + work.starting || threads.len() == MOST {
            drop(work);
            self.shared.changed.notify_one();
            return;
        }
        work.starting += 1;
        drop(work);
        let shared = self.shared.clone();
        match spawn(Box::new(move || shared.work())) {
            Ok(thread) => threads.push(thread),
            // Without a thread for it, the device's own has to do it.
            Err(_) => {
                let mut work = self.shared.work.lock();
                work.starting -= 1;
                if let Some(request) = work.waiting.pop_front() {
                    drop(work);
                    self.shared.carry_out(request);
                }
            }
        }
    }

    /// The requests that have been carried out since this was last called.
    pub(super) fn take_done(&self) -> Vec<Done> {
        self.shared.done.clear();
        self.shared.work.lock().take_done()
    }

    /// Waits until all requests are carried out, and the threads have ended. Returns those that were not taken.
    pub(super) fn end(&self) -> Vec<Done> {
        self.shared.work.lock().ending = true;
        self.shared.changed.notify_all();
        for thread in std::mem::take(&mut *self.threads.lock()) {
            if let Err(panic) = thread.join()
                && !std::thread::panicking()
            {
                std::panic::resume_unwind(panic);
            }
        }
        self.shared.done.clear();
        let mut work = self.shared.work.lock();
        let done = work.take_done();
        *work = Work::default();
        done
    }
}

impl<T: CarryOut> Drop for Helpers<T> {
    /// They have ended by now, unless the device's own thread panicked.
    fn drop(&mut self) {
        self.end();
    }
}

impl<T: CarryOut> AsFd for Helpers<T> {
    /// Readable when requests have been carried out.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.done.as_fd()
    }
}

impl Work {
    fn take_done(&mut self) -> Vec<Done> {
        self.under_way -= self.done.len();
        std::mem::take(&mut self.done)
    }
}

impl<T: CarryOut> Shared<T> {
    /// A thread's body.
    fn work(&self) {
        let mut work = self.work.lock();
        work.starting -= 1;
        loop {
            match work.waiting.pop_front() {
                Some(request) => MutexGuard::unlocked(&mut work, || self.carry_out(request)),
                None if work.ending => return,
                None => {
                    work.idle += 1;
                    self.changed.wait(&mut work);
                    work.idle -= 1;
                }
            }
        }
    }

    fn carry_out(&self, request: Request) {
        let told = self.task.carry_out(&request);
        self.work.lock().done.push((request, told));
        self.done.ring();
    }
}
