//! Virtio devices, the built-in ones and those in Python.
//!
//! - [`builtin`]: the built-in devices as Python classes
//! - [`console`]: what a guest writes to a console, and reads from it
//! - [`python`]: a Python object as a device; [`request`]: what its `process` is called with

pub(crate) mod builtin;
pub(crate) mod console;
pub(crate) mod python;
pub(crate) mod request;
