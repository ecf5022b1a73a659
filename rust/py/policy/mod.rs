//! Policies: requests, decisions, Python policies and the built-in ones.

pub(crate) mod asker;
pub(crate) mod builtin;
pub(crate) mod decision;
pub(crate) mod device_access;
pub(crate) mod hooks;
pub(crate) mod judge;
pub(crate) mod request;
