//! The core of pagegate: a virtual machine on KVM that stops whenever its guest asks for a page to become private or
//! shared, or touches one in the wrong state. A policy decides each request.
//!
//! One module for each concern, and each uses only those after it: [`machine`], [`trace`], [`vcpu`], [`boot`],
//! [`devices`], [`events`], [`policy`], [`memory`], [`hypervisor`], [`x86`]. A request is an exit of KVM_RUN
//! ([`hypervisor::exit`]), which [`vcpu`] dispatches and puts to the policy; then come the conversion
//! ([`memory::conversion`]), the event ([`events`]), and the next KVM_RUN.
//!
//! A machine is a [`machine::config::Config`], from which [`machine::assembly::Machine::new`] makes it; a policy is what
//! implements [`policy::hooks::Policy`]. `examples/keep_the_kernel.rs` runs a guest under one. Without /dev/kvm, on a
//! hypervisor that replays scripts:
//!
//! ```
//! use std::sync::Arc;
//!
//! use pagegate_core::boot::start::CpuMode;
//! use pagegate_core::hypervisor::fake::{FakeVm, Step};
//! use pagegate_core::machine::assembly::Machine;
//! use pagegate_core::machine::config::Config;
//! use pagegate_core::policy::quota::Quota;
//! use pagegate_core::policy::simple::Allow;
//!
//! // Two pages are asked for, to become shared, and one may.
//! let asks = |gpa| Step::Doorbell([12, gpa, 1, 0]);
//! let fake = FakeVm::new(FakeVm::protected(64), vec![vec![asks(0), asks(0x1000)]], 1);
//! let policy = Quota { max_shared: 4096, then: Arc::new(Allow) };
//! let mut config = Config::new(1 << 20, Arc::new(policy));
//! config.initial = pagegate_core::memory::address::State::Private;
//! config.hypervisor = Some(Arc::new(fake));
//! let machine = Machine::new(config)?;
//! machine.start(0, CpuMode::Protected, &[], &mut || Ok(()))?;
//! let report = machine.run(None, &mut || Ok(()))?;
//! assert_eq!((report.tally.conversions, report.tally.denied), (1, 1));
//! # Ok::<(), pagegate_core::error::Error>(())
//! ```

// The lists of files at the head of modules name those that are private, too.
#![allow(rustdoc::private_intra_doc_links)]

mod allocation;
pub mod boot;
mod clock;
pub mod devices;
pub mod errno;
pub mod error;
pub mod events;
pub mod hypervisor;
pub mod input;
pub mod machine;
pub mod memory;
pub mod policy;
pub mod process;
pub mod trace;
pub mod vcpu;
pub mod x86;
