//! Requests as events, and tables of them.

pub(crate) mod arrow;
pub(crate) mod event;
