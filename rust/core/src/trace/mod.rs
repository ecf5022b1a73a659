//! Traces: the requests of a run, written to a file while the guest runs, and put to other policies later.
//!
//! - [`about`]: the machine that a trace is from; [`data`]: a trace in memory
//! - [`mod@file`]: writing Parquet and Arrow IPC, into [`sink`], which may be a pipe; [`recorder`]: writes a running machine's
//!   events to a file
//! - [`read`]: reading what may be damaged; `limits`: how much a file may ask for; `ipc`, `parquet_check` with
//!   `parquet_shapes` and `thrift`: whether it does
//! - [`replay`]: puts a trace to policies; [`synthetic`]: generated traces

pub mod about;
pub mod data;
pub mod file;
mod ipc;
mod limits;
mod parquet_check;
mod parquet_shapes;
pub mod read;
pub mod recorder;
pub mod replay;
pub mod sink;
pub mod synthetic;
mod thrift;
