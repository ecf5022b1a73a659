//! The log: one event for each request, in columns.
//!
//! - [`event`]: an event's fields; `columns`: the columns that hold them, by name and type
//! - `chunk`: memory for some rows of all columns; [`log`]: a bounded ring of chunks for each vCPU; `others`: what is no vCPU's
//!   request
//! - [`table`]: events as Arrow record batches; [`import`]: events of record batches that another tool may have written

mod chunk;
mod columns;
pub mod event;
pub mod import;
pub mod log;
mod others;
pub mod table;
