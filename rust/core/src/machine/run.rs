//! A run: a thread for each vCPU, from the first KVM_RUN until something ends the run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::assembly::{Machine, outside_listeners};
use super::report::Report;
use crate::error::{Error, Failure};
use crate::vcpu::control::Control;
use crate::vcpu::run_loop;
use crate::vcpu::state::VcpuState;
use crate::vcpu::tally::Tally;

const RUNNING: &str =
    "this machine is running already: run() cannot be called again until it has returned, nor in a hook";
/// How often a thread that waits for a vCPU to begin a run looks whether there is a run already.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

impl Machine {
    /// Runs every started vCPU, each in a thread of its own, until something ends the run. `interrupt` is called some
    /// forty times a second; its failure ends the run.
    ///
    /// # Errors
    /// `Busy` if a run is in progress, no vCPU was started, or a listener calls this; else the first failure of the
    /// run.
    pub fn run(
        &self,
        timeout: Option<Duration>,
        interrupt: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Report, Error> {
        outside_listeners()?;
        /// Clears `current` when the run is over, also after a panic.
        struct Over<'a>(&'a Mutex<Option<Arc<Control>>>);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                *self.0.lock() = None;
            }
        }
        let begun = Instant::now();
        let (control, vcpus) = self.begin()?;
        let over = Over(&self.current);
        let deadline = timeout.and_then(|timeout| begun.checked_add(timeout));
        let mut total = Tally::default();
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for vcpu in vcpus {
                let name = format!("pagegate-vcpu{}", vcpu.index);
                let body = || self.vcpu_thread(&control, vcpu);
                match std::thread::Builder::new().name(name).spawn_scoped(scope, body) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        control.thread_ended();
                        let what = "start a vCPU thread";
                        let errno = error.into();
                        control.finish(Err(Error::Host { what, errno }));
                    }
                }
            }
            control.wait(deadline, interrupt);
            for thread in threads {
                match thread.join() {
                    Ok(tally) => total.add(&tally),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
        });
        drop(over);
        Ok(Report {
            reason: control.take_end()?,
            tally: total,
            duration: begun.elapsed(),
        })
    }

    fn begin(&self) -> Result<(Arc<Control>, Vec<MutexGuard<'_, VcpuState>>), Error> {
        let mut vcpus = Vec::new();
        for vcpu in &self.vcpus {
            // Between runs another thread locks a vCPU to start it or to read its registers, which can take as long as a
            // listener takes. A run holds it until it is over.
            vcpus.push(loop {
                if self.running() {
                    return Err(Error::Busy(RUNNING));
                }
                if let Some(vcpu) = vcpu.try_lock_for(LOOK_AGAIN) {
                    break vcpu;
                }
            });
        }
        let mut current = self.current.lock();
        if current.is_some() {
            return Err(Error::Busy(RUNNING));
        }
        vcpus.retain(|vcpu| vcpu.started);
        if vcpus.is_empty() {
            return Err(Error::Busy(
                "no vCPU is ready to run: call vm.vcpus[0].start(...) first",
            ));
        }
        let kicks = vcpus.iter().map(|vcpu| self.kicks[vcpu.index as usize].clone());
        let control = Arc::new(Control::new(kicks.collect()));
        *current = Some(control.clone());
        Ok((control, vcpus))
    }

    fn vcpu_thread(&self, control: &Control, mut vcpu: MutexGuard<'_, VcpuState>) -> Tally {
        /// Reports the end of the thread, also after a panic, which stops the run.
        struct Ended<'a>(&'a Control);
        impl Drop for Ended<'_> {
            fn drop(&mut self) {
                if std::thread::panicking() {
                    self.0.stop("stopped");
                }
                self.0.thread_ended();
            }
        }
        let _ended = Ended(control);
        let mut tally = Tally::default();
        let kick = self.kick(vcpu.index);
        let mut body = || match kick.attach() {
            Ok(_attached) => tally = run_loop::run(self.context(control), &mut vcpu, kick),
            Err(errno) => {
                let what = "install the signal handler that stops vCPUs";
                control.finish(Err(Error::Host { what, errno }));
            }
        };
        match &self.around {
            Some(around) => around(&mut body),
            None => body(),
        }
        tally
    }

    /// Ends the run in progress, from any thread; without one it does nothing.
    pub fn stop(&self) {
        let current = self.current.lock().clone();
        if let Some(control) = current {
            control.stop("stopped");
        }
    }

    /// Whether a run is in progress.
    pub fn running(&self) -> bool {
        self.current.lock().is_some()
    }
}
