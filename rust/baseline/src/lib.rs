//! The baseline: the bare loop around KVM's ioctls that pagegate is measured against, as one would write it for this
//! guest alone. It runs the same guest code as pagegate and makes the same system calls for each request. It has no
//! policy, does not check what the guest asks for, undoes nothing after an error, and keeps no page states, counts or
//! events.
//!
//! With attributes it sets the attribute of the pages and discards their old side; with traps it sets those of both views
//! and discards the old side; with memslots it replaces memslots.
//! The guest marks the beginning and the end of the measured part by port IO.

mod abi;
mod convert;
mod missing;
mod pages;
mod plan;
mod slots;
mod start;
mod threads;
mod vcpu;
mod vm;

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

pub use crate::missing::serve;
use crate::plan::Span;
pub use crate::plan::{END, Measured, Mode, Plan, Start, Work};
use crate::threads::Threads;
use crate::vcpu::BareVcpu;
use crate::vm::BareVm;

/// How often `run` checks the timeout and calls `interrupt`.
const POLL: Duration = Duration::from_millis(25);

/// Runs the guest until every vCPU halts. `interrupt` is called some forty times a second; if it returns true, the run
/// ends.
///
/// # Errors
/// The kernel's; `TimedOut` after `timeout`; `Interrupted` if `interrupt` returned true; `InvalidData` for a guest that
/// does something that this program does not handle, or that leaves out a mark.
pub fn run(plan: &Plan, timeout: Option<Duration>, interrupt: &mut dyn FnMut() -> bool) -> io::Result<Measured> {
    let vm = BareVm::new(plan)?;
    let starts = plan.vcpus.iter().enumerate();
    let vcpus = starts.map(|(index, start)| BareVcpu::new(&vm, index, start));
    let vcpus = vcpus.collect::<io::Result<Vec<_>>>()?;
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let threads = Threads::new(vcpus.len())?;
    let (spans, given_up) = std::thread::scope(|scope| {
        let control = &threads;
        let body = |mut vcpu: BareVcpu<'_>| {
            let _running = control.enter()?;
            vcpu.run(&control.leave)
        };
        let threads: Vec<_> = vcpus.into_iter().map(|vcpu| scope.spawn(move || body(vcpu))).collect();
        let mut given_up = None;
        while !control.wait(POLL) {
            if given_up.is_none() {
                let late = deadline.is_some_and(|deadline| deadline <= Instant::now());
                given_up = late.then_some(io::ErrorKind::TimedOut);
                given_up = given_up.or_else(|| interrupt().then_some(io::ErrorKind::Interrupted));
            }
            if given_up.is_some() {
                control.leave.store(true, Ordering::SeqCst);
            }
            if control.leave.load(Ordering::SeqCst) {
                control.kick();
            }
        }
        // All are joined, even if the first of them failed.
        let ends: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        (ends, given_up)
    });
    // A vCPU that failed made the others leave, so the first error is the one to return.
    let mut measured = Vec::new();
    for span in spans {
        match span {
            Ok(span) => measured.extend(span?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    if let Some(kind) = given_up {
        return Err(kind.into());
    }
    sum(&measured, plan.vcpus.len()).ok_or_else(|| {
        let text = "the guest did not mark the beginning and the end of the measured part";
        io::Error::new(io::ErrorKind::InvalidData, text)
    })
}

/// The sums of all vCPUs; `None` if one of them left out a mark.
fn sum(spans: &[Span], vcpus: usize) -> Option<Measured> {
    let begin = spans.iter().map(|span| span.begin).min()?;
    let end = spans.iter().map(|span| span.end).max()?;
    (spans.len() == vcpus).then(|| Measured {
        time: end.saturating_duration_since(begin),
        requests: spans.iter().map(|span| span.requests).sum(),
        port_io: spans.iter().map(|span| span.port_io).sum(),
    })
}
