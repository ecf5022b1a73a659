//! Who decides about a request, and what can be decided.
//!
//! - [`request`], [`map_gpa_range`]: what a policy is told, implicit or explicit; [`decision`]: what it can answer
//! - [`hooks`]: the trait; [`current`]: the policy in place, replaced while the guest runs
//! - [`simple`], [`align`], [`quota`], [`window`], [`rate_limit`], [`ping_pong`]: built-in policies
//! - [`remember`]: answers for more than one request, around any policy
//! - [`trial`]: judges without a machine

pub mod align;
mod chain;
pub mod current;
pub mod decision;
pub mod hooks;
pub mod map_gpa_range;
pub mod ping_pong;
pub mod quota;
pub mod rate_limit;
pub mod remember;
pub mod request;
pub mod simple;
pub mod trial;
pub mod window;
