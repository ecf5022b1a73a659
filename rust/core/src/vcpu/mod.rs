//! The loop of a vCPU: enter the guest, answer the exit, enter again.
//!
//! - [`run_loop`]: enters the guest and dispatches each exit; [`frequent`]: a shorter way for the two most frequent
//!   exits
//! - [`explicit`], [`implicit`], [`poison`], [`device_io`]: one file for each kind of request
//! - [`request`]: what explicit and implicit requests have in common
//! - [`running`]: a vCPU's data during a run; [`state`]: what it keeps between runs
//! - [`control`], [`kick`]: ending a run, and bringing a vCPU out of KVM_RUN

pub(crate) mod control;
mod device_io;
mod explicit;
mod frequent;
mod implicit;
pub(crate) mod kick;
mod poison;
mod request;
pub(crate) mod run_loop;
pub mod running;
pub(crate) mod state;
pub mod tally;
