//! Policies: what they are asked, what they can answer, and the built-in ones.
//!
//! - [`request`]: what a policy is asked; [`map_gpa_range`]: the registers of an explicit request
//! - [`device_access`]: what it is asked about a device
//! - [`decision`]: what it can answer
//! - [`hooks`]: the trait; [`current`]: the policy that is in place, which can be replaced while the guest runs
//! - [`simple`], [`align`], [`quota`], [`window`], [`rate_limit`], [`ping_pong`]: built-in policies
//! - [`remember`]: wraps a policy and remembers decisions that hold for a region
//! - [`knowledge`]: what built-in policies know, as it is put aside with a machine
//! - [`filter`]: which requests a hook wants to be asked about
//! - [`trial`]: asks a policy without a machine

pub mod align;
mod chain;
pub mod current;
pub mod decision;
pub mod device_access;
pub mod filter;
pub mod hooks;
pub mod knowledge;
pub mod map_gpa_range;
pub mod ping_pong;
pub mod quota;
pub mod rate_limit;
pub mod remember;
pub mod request;
pub mod simple;
pub mod trial;
pub mod window;
