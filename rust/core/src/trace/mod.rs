//! Traces: the requests of a run, written to a file while the guest runs, and put to other policies later.
//!
//! - [`about`]: the machine that a trace is from; [`data`]: a trace in memory
//! - [`file`]: Parquet and Arrow IPC; [`recorder`]: writes a running machine's events to a file
//! - [`replay`]: puts a trace to policies; [`synthetic`]: generated traces

pub mod about;
pub mod data;
pub mod file;
pub mod recorder;
pub mod replay;
pub mod synthetic;
