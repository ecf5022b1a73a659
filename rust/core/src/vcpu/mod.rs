//! The loop of a vCPU: enter the guest, answer the exit, enter again.
//!
//! - [`run_loop`]: enters the guest and dispatches each exit; [`frequent`]: a shorter way for the two most frequent
//!   exits
//! - [`explicit`], [`implicit`], [`poison`], [`device_io`], [`msr`]: one file for each kind of request
//! - [`halted`]: whether a PC has halted for good; [`unpaged`]: accesses without paging, which a SEV guest's CPU makes private
//! - [`read_back`]: instructions that write back what they read, where KVM emulates them
//! - [`request`]: what explicit and implicit requests have in common
//! - [`running`]: a vCPU's data during a run; [`state`]: what it keeps between runs
//! - [`saved`]: a vCPU in a snapshot
//! - [`asker`]: who asks, for hooks that want to know more of the vCPU
//! - [`control`], [`kick`]: ending a run, and bringing a vCPU out of KVM_RUN; [`signal`]: by which signal

pub mod asker;
pub(crate) mod control;
mod device_io;
mod explicit;
mod frequent;
mod halted;
mod implicit;
pub(crate) mod kick;
mod msr;
mod poison;
mod read_back;
mod request;
pub(crate) mod run_loop;
pub mod running;
pub(crate) mod saved;
pub mod signal;
pub(crate) mod state;
pub mod tally;
mod unpaged;
