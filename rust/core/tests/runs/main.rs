//! Whole runs of scripted guests: what the policy is asked, what the guest is answered, what is recorded.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod guest;

mod devices;
mod ending;
mod events;
mod explicit;
mod implicit;
mod kvm_run;
mod poison;
mod policies;
mod read_back;
mod vcpus;
