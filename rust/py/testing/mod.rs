//! What `pagegate.testing` is made of.

pub(crate) mod fake;
pub(crate) mod trial;
