//! The core of pagegate: a virtual machine on KVM that stops whenever its guest asks for a page to become private or
//! shared, or touches one in the wrong state. A policy decides each request.
//!
//! One module for each concern, and each uses only those after it: [`machine`], [`trace`], [`vcpu`], [`boot`],
//! [`devices`], [`events`], [`policy`], [`memory`], [`hypervisor`], [`x86`]. A request is an exit of KVM_RUN
//! ([`hypervisor::exit`]), which [`vcpu`] dispatches and puts to the policy; then come the conversion
//! ([`memory::conversion`]), the event ([`events`]), and the next KVM_RUN.

pub mod boot;
pub mod devices;
pub mod errno;
pub mod error;
pub mod events;
pub mod hypervisor;
pub mod machine;
pub mod memory;
pub mod policy;
pub mod trace;
pub mod vcpu;
pub mod x86;
