//! KVM, and the fake that stands in for it in tests. Everything above this room is the same over both.
//!
//! - [`vm`]: the traits of a virtual machine and of a vCPU, in KVM's own words
//! - [`kvm`]: /dev/kvm; [`fake`]: vCPUs that replay scripts, and calls that fail on demand
//! - [`exit`]: what a return of KVM_RUN means
//! - [`interrupts`]: interrupts by number
//! - [`host`]: what this host's KVM offers; [`mapping`]: host memory for memslots; `userfault`: pages of it that come when they are
//!   touched

pub mod exit;
pub mod fake;
pub mod host;
pub mod hypercall;
pub mod interrupts;
pub mod kvm;
pub mod mapping;
pub(crate) mod raw;
pub(crate) mod userfault;
pub mod vm;
