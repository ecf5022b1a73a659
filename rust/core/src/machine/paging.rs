//! Missing pages of a machine, and the thread that gives them their bytes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::assembly::Machine;
use super::config::ThreadWrapper;
use crate::error::Error;
use crate::memory::missing::pager::Pager;
use crate::memory::missing::{Came, Missing, PageBits, Surroundings};
use crate::vcpu::control::Control;

/// Why a machine cannot be put back now.
pub(super) const HANGS: &str = "its pager has not answered yet: the machine can be put back when it has";
/// Why a machine cannot be put back.
pub(super) const NOT_LAZY: &str = "only a machine that was resumed lazily can be put back to a snapshot: \
                                   Vm.resume(folder, lazy=True)";

impl Machine {
    /// From now on all of memory comes from a pager when it is touched.
    pub(super) fn begin_all_missing(&self, pager: Arc<dyn Pager>) -> Result<(), Error> {
        self.own_pager.store(true, Ordering::Relaxed);
        self.begin_missing(self.memory.all_pages()?, pager, self.around.clone())
    }

    /// From now on these pages, by state, come from a pager when they are touched. `around`: what the pager's thread needs.
    pub(super) fn begin_missing(
        &self,
        pages: [PageBits; 2],
        pager: Arc<dyn Pager>,
        around: Option<ThreadWrapper>,
    ) -> Result<(), Error> {
        let kicks = self.kicks.clone();
        let vcpu = move |thread| {
            kicks
                .iter()
                .position(|kick| kick.is_run_by(thread))
                .map(|vcpu| vcpu as u32)
        };
        let (current, ending) = (self.current.clone(), self.current.clone());
        let events = self.events().clone();
        let surroundings = Surroundings {
            vcpu: Box::new(vcpu),
            end: Box::new(move |error| current.fail(error)),
            note: Box::new(move |came| events.missing_page(came)),
            is_ending: Box::new(move || ending.ending()),
        };
        let missing = self.memory.begin_missing(pages, pager, surroundings)?;
        self.serve(missing, around)
    }

    /// From now on these pages are missing, and no others; all else is zeroes.
    ///
    /// # Errors
    /// `Busy` while the pager hangs.
    pub(super) fn begin_again(
        &self,
        missing: &Arc<Missing>,
        pages: [PageBits; 2],
        pager: Arc<dyn Pager>,
    ) -> Result<(), Error> {
        let held = self.memory.hold_all();
        missing.pause();
        if !self.pager_has_ended() {
            return Err(Error::Busy(HANGS));
        }
        self.memory.begin_again(missing, pages, pager)?;
        drop(held);
        self.serve(missing.clone(), None)
    }

    fn serve(&self, missing: Arc<Missing>, around: Option<ThreadWrapper>) -> Result<(), Error> {
        let mut thread = std::thread::Builder::new().name("pagegate-pager".to_owned());
        if let Some(stack) = self.stack {
            thread = thread.stack_size(stack);
        }
        let started = thread.spawn(move || match around {
            Some(around) => around(&mut || missing.serve()),
            None => missing.serve(),
        });
        match started {
            Ok(thread) => {
                *self.pager_thread.lock() = Some(thread);
                Ok(())
            }
            Err(error) => {
                self.memory.end_missing();
                let what = "start the pager's thread";
                let errno = error.into();
                Err(Error::Host { what, errno })
            }
        }
    }

    /// Waits for the pager's thread, for as long as a pager may reasonably take. Returns whether it has ended.
    pub(super) fn pager_has_ended(&self) -> bool {
        const PATIENCE: Duration = Duration::from_secs(1);
        let mut held = self.pager_thread.lock();
        // A child that was forked does not have the thread.
        let Some(thread) = held.take().filter(|_| self.current.is_of_this_process()) else {
            return true;
        };
        let ended = ends_before(&thread, Instant::now() + PATIENCE);
        match ended {
            // A panic of it is one of a pager in Rust, and was printed.
            true => drop(thread.join()),
            false => *held = Some(thread),
        }
        ended
    }

    /// Pages do not come any more, and the pager's thread is waited for until `deadline`, and after that by nobody: the
    /// interpreter that it needs is ending.
    pub fn end_pager(&self, deadline: Instant) {
        self.memory.end_missing();
        if let Some(thread) = self.pager_thread.lock().take() {
            ends_before(&thread, deadline);
        }
    }

    /// Called again and again in a run: lets vCPUs leave that KVM keeps because of a page that does not come.
    pub(super) fn let_go_of_missing(&self, control: &Control, leaving: &mut Option<Instant>) {
        let Some(missing) = self.memory.missing().filter(|_| control.leaving()) else {
            return;
        };
        let waited = leaving.get_or_insert_with(Instant::now).elapsed();
        if self.kicks.iter().any(|kick| kick.is_inside()) {
            missing.give_up_after(waited);
        }
    }

    /// Bytes of both sides that are missing: nobody has touched them since the machine went on.
    pub fn missing_bytes(&self) -> u64 {
        self.memory.missing().map_or(0, |missing| missing.bytes())
    }

    /// The pages that were asked for until now, in this order.
    pub fn working_set(&self) -> Vec<Came> {
        self.memory.missing().map_or_else(Vec::new, |missing| missing.came())
    }
}

/// Waits for a thread. Returns whether it has ended.
fn ends_before(thread: &JoinHandle<()>, deadline: Instant) -> bool {
    while !thread.is_finished() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(200));
    }
    thread.is_finished()
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Before its vCPUs: KVM waits there for pages that it has touched.
        self.memory.end_missing();
    }
}
