//! The core of pagegate: a virtual machine whose guest asks before a page becomes private or shared, or touches one in the
//! wrong state; a policy judges each request.
//!
//! One floor a concern, arrows only downwards: [`machine`], [`trace`], [`vcpu`], [`boot`], [`devices`], [`events`],
//! [`policy`], [`memory`], [`hypervisor`], [`x86`]. The way of a request: an exit ([`hypervisor::exit`]), its dispatch and
//! the question to the policy ([`vcpu`]), the conversion ([`memory::conversion`]), the record ([`events`]), and resume.

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
