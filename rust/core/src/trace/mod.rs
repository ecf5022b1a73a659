//! Recorded requests: written to files while a guest runs, and put to other policies later.
//!
//! - [`about`]: the machine that a trace is from; [`data`]: a trace in memory
//! - [`file`]: Parquet and Arrow IPC; [`recorder`]: from a running machine into a file
//! - [`replay`]: other policies asked; [`synthetic`]: requests that no guest made

pub mod about;
pub mod data;
pub mod file;
pub mod recorder;
pub mod replay;
pub mod synthetic;
