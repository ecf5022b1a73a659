//! The native part of `pagegate.testing`.

pub(crate) mod fake;
pub(crate) mod trial;
