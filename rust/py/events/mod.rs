//! Events, as objects and as Arrow tables.

pub(crate) mod arrow;
pub(crate) mod event;
pub(crate) mod html;
