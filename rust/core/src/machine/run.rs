//! A run: a thread for each vCPU, from the first KVM_RUN until something ends the run.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;

use super::assembly::Machine;
use super::current::Watched;
use super::entering::Entering;
use super::report::Report;
use crate::devices::virtio::run::Accesses;
use crate::error::{ConvertError, Error, Failure};
use crate::memory::guest_memory::LOOK_AGAIN;
use crate::vcpu::asker::{Asker, Whereabouts};
use crate::vcpu::control::Control;
use crate::vcpu::run_loop;
use crate::vcpu::signal::Installed;
use crate::vcpu::state::VcpuState;
use crate::vcpu::tally::Tally;

/// Bytes of a thread's stack where there is no limit to it.
const STACK: usize = 8 << 20;

/// A run that was claimed: nobody else can begin one, nor close the machine, until this is dropped or has run. A stop and
/// the deadline hold from the claim on, so that what is done before the vCPUs run is a part of the run.
pub struct Claim<'a> {
    over: Over<'a>,
    begun: Instant,
    deadline: Option<Instant>,
    tally: Tally,
}

/// Gives the claim up when dropped, also after a panic.
pub struct Over<'a>(&'a Machine);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.current.over(self.0.events().total());
    }
}

/// What a run did until it ended.
struct Done {
    tally: Tally,
    at: Option<Whereabouts>,
    accesses: Arc<Accesses>,
}

/// A run whose threads have ended.
pub struct Ended<'a> {
    /// What it did; if it failed, its reason is "livelock", "interrupted" or "failed".
    pub report: Report,
    /// Why it failed.
    pub error: Option<Error>,
    /// Nobody else can begin one until this is dropped, so that its report can be put where others look for it.
    pub over: Over<'a>,
}

impl<'a> Claim<'a> {
    /// Runs every started vCPU, each in a thread of its own, until something ends the run. `interrupt` is called some
    /// forty times a second; its failure ends the run. So does what ends it before a vCPU runs, while listeners are told
    /// or a vCPU is waited for.
    ///
    /// It fails with `Busy` if no vCPU was started; with a listener's failure, as `HostConversion`, if one that failed
    /// before fails again; else with the first failure of the run.
    pub fn run(self, interrupt: &mut dyn FnMut() -> Result<(), Failure>) -> Ended<'a> {
        let Self {
            over,
            begun,
            deadline,
            tally,
        } = self;
        let mut done = Done {
            tally,
            at: None,
            accesses: Arc::default(),
        };
        let dropped = over.0.events().malformed_dropped();
        let (reason, error) = match over.0.run_claimed(deadline, interrupt, &mut done) {
            Ok(reason) => (reason, None),
            Err(error @ Error::Livelock { .. }) => ("livelock".to_owned(), Some(error)),
            Err(error @ Error::Interrupted(_)) => ("interrupted".to_owned(), Some(error)),
            Err(error) => ("failed".to_owned(), Some(error)),
        };
        let (device_accesses, device_access) = done.accesses.take();
        let report = Report {
            reason,
            at: done.at,
            debug_private: over.0.debug_private(),
            device_accesses,
            device_access,
            malformed_dropped: over.0.events().malformed_dropped().saturating_sub(dropped),
            tally: done.tally,
            duration: begun.elapsed(),
        };
        Ended { report, error, over }
    }
}

impl Machine {
    /// Claims a run, whose `timeout` begins now.
    ///
    /// # Errors
    /// `Busy` if there is one already, the machine is closed, or a listener calls this; `Host` without memory for what is
    /// counted.
    pub fn claim_run(&self, timeout: Option<Duration>) -> Result<Claim<'_>, Error> {
        self.outside_callbacks()?;
        let begun = Instant::now();
        // Before anything has begun: there may be no memory for it.
        let tally = Tally::new()?;
        self.current.enter()?;
        Ok(Claim {
            over: Over(self),
            begun,
            deadline: timeout.and_then(|timeout| begun.checked_add(timeout)),
            tally,
        })
    }

    /// Claims a run and carries it out.
    ///
    /// # Errors
    /// Those of [`Machine::claim_run`] and [`Claim::run`].
    pub fn run(
        &self,
        timeout: Option<Duration>,
        interrupt: &mut dyn FnMut() -> Result<(), Failure>,
    ) -> Result<Report, Error> {
        let Ended { report, error, .. } = self.claim_run(timeout)?.run(interrupt);
        error.map_or(Ok(report), Err)
    }

    fn run_claimed(
        &self,
        deadline: Option<Instant>,
        interrupt: &mut dyn FnMut() -> Result<(), Failure>,
        done: &mut Done,
    ) -> Result<String, Error> {
        let mut entering = Entering::new(&self.current, deadline, interrupt);
        self.memory.ask_again()?;
        let failed = |failure| Error::HostConversion(ConvertError::Listener(failure));
        let told = self.memory.tell_listeners_again(&mut || entering.goes_on());
        told.map_err(failed)?;
        let vcpus = self.vcpus_to_run(&mut entering)?;
        if let Some(end) = entering.end() {
            return end;
        }
        let _signal = Installed::install()?;
        let control = self.begin(&vcpus);
        let mut tallies = vcpus.iter().map(|_| Tally::new()).collect::<Result<Vec<_>, _>>()?;
        let stack = self.stack.unwrap_or_else(usual_stack);
        let accesses = &done.accesses;
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for (vcpu, tally) in vcpus.into_iter().zip(&mut tallies) {
                let name = format!("pagegate-vcpu{}", vcpu.index);
                let body = || self.vcpu_thread(&control, vcpu, tally);
                let thread = std::thread::Builder::new().name(name).stack_size(stack);
                match thread.spawn_scoped(scope, body) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        control.thread_ended();
                        let what = "start a vCPU thread";
                        let errno = error.into();
                        control.finish(Err(Error::Host { what, errno }));
                    }
                }
            }
            let devices = self.start_devices(scope, &control, stack, accesses);
            let mut leaving = None;
            let mut look = || {
                self.let_go_of_missing(&control, &mut leaving);
                interrupt()
            };
            control.wait(deadline, &mut look);
            devices.end(&control, interrupt);
            for thread in threads {
                if let Err(panic) = thread.join() {
                    std::panic::resume_unwind(panic);
                }
            }
        });
        tallies.iter().for_each(|tally| done.tally.add(tally));
        done.at = control.take_whereabouts();
        control.take_end()
    }

    /// The vCPUs that are to run, locked; none if the run is to end already.
    fn vcpus_to_run(&self, entering: &mut Entering<'_>) -> Result<Vec<MutexGuard<'_, VcpuState>>, Error> {
        let mut vcpus = Vec::new();
        for vcpu in &self.vcpus {
            // Between runs another thread locks a vCPU to start it or to read its registers, which can take as long as a
            // listener takes. A run holds it until it is over.
            vcpus.push(loop {
                if entering.has_ended() {
                    return Ok(Vec::new());
                }
                if let Some(vcpu) = vcpu.try_lock_for(LOOK_AGAIN) {
                    break vcpu;
                }
                entering.goes_on();
            });
        }
        if entering.has_ended() {
            return Ok(Vec::new());
        }
        vcpus.retain(|vcpu| vcpu.started);
        if vcpus.is_empty() {
            return Err(Error::Busy(
                "no vCPU is ready to run: call vm.boot(...) or vm.vcpus[0].start(...) first",
            ));
        }
        // After "halt" all of them go on behind their HLT. Else one that halted rests until it is started again.
        match vcpus.iter().all(|vcpu| vcpu.halted) {
            true => vcpus.iter_mut().for_each(|vcpu| vcpu.halted = false),
            false => vcpus.retain(|vcpu| !vcpu.halted),
        }
        Ok(vcpus)
    }

    fn begin(&self, vcpus: &[MutexGuard<'_, VcpuState>]) -> Arc<Control> {
        let kicks = vcpus.iter().map(|vcpu| self.kicks[vcpu.index as usize].clone());
        let control = Arc::new(Control::new(kicks.collect(), self.pc.is_some()));
        self.current.begin(control.clone());
        control
    }

    fn vcpu_thread(&self, control: &Arc<Control>, mut vcpu: MutexGuard<'_, VcpuState>, tally: &mut Tally) {
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
        let kick = self.kick(vcpu.index);
        let mut body = || match kick.attach() {
            Ok(_attached) => {
                let run = control.clone();
                let ending = Arc::new(move || run.leaving());
                let asker = Asker::new(vcpu.hv.inspect(), self.memory.clone(), self.kernel(), ending);
                run_loop::run(self.context(control), asker, &mut vcpu, kick, tally);
            }
            Err(errno) => {
                let what = "unblock the signal that stops vCPUs";
                control.finish(Err(Error::Host { what, errno }));
            }
        };
        match &self.around {
            Some(around) => around(&mut body),
            None => body(),
        }
    }

    /// Ends the run in progress, from any thread, also one whose vCPUs have not begun yet; without one it does nothing.
    pub fn stop(&self) {
        self.current.stop("stopped");
    }

    /// The run in progress, else the last one, else the first that there will be.
    pub fn watched(&self) -> Arc<Watched> {
        self.current.watched()
    }

    /// Whether a run is in progress.
    pub fn running(&self) -> bool {
        self.current.running()
    }
}

/// Bytes of stack that a C library gives its threads. Rust's threads have 2 MiB, which recursion in a Python hook
/// exhausts before Python's own limit ends it.
fn usual_stack() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Stack).current;
    limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(STACK)
}
