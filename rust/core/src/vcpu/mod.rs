//! The loop of a vCPU: from an exit to its answer.
//!
//! - [`run_loop`]: enters the guest and dispatches each exit, once; [`frequent`]: the two most frequent exits
//! - [`explicit`], [`implicit`], [`poison`], [`device_io`]: one file for each kind of request
//! - [`request`]: what both kinds of conversion request have in common
//! - [`running`]: what the loop works with; [`state`]: what a vCPU keeps between runs
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
