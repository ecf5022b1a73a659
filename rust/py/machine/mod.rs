//! The machine, the objects that belong to it, and the Python objects that it calls.

pub(crate) mod attributes;
pub(crate) mod device_io;
pub(crate) mod event_log;
pub(crate) mod handlers;
pub(crate) mod host;
mod image;
pub(crate) mod input;
mod linux;
pub(crate) mod listener;
pub(crate) mod marks;
pub(crate) mod missing;
pub(crate) mod parts;
pub(crate) mod policy_handle;
pub(crate) mod report;
mod runs;
mod snapshot;
pub(crate) mod vcpu;
pub(crate) mod vm;
