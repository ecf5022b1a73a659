//! The log of requests: one event each, in columns.
//!
//! - [`event`]: what an event says; `columns`: where it is kept, and under which name
//! - `chunk`: some rows of all columns; [`log`]: a bounded ring of chunks for each vCPU
//! - [`table`]: events as Arrow record batches

mod chunk;
mod columns;
pub mod event;
pub mod log;
pub mod table;
