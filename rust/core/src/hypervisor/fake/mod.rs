//! A hypervisor without KVM: each vCPU replays a script, and any call can be made to fail.
//!
//! It keeps memslots and attributes as KVM does, with KVM's errors for misuse, so that a test can compare what KVM
//! would enforce with the core's page map.

mod kernel;
mod registers;
mod script;
mod vcpu;
mod vm;

pub use kernel::{CallName, Injection};
pub use script::{Reply, Step};
pub use vm::FakeVm;
