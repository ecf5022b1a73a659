//! A trace in memory, and why one cannot be had.

use super::about::About;
use crate::events::event::Event;

/// Requests, and the machine that they were made in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The machine.
    pub about: About,
    /// The requests, in the order in which they were over.
    pub events: Vec<Event>,
    /// It was read from a stream that ends in the middle: whoever wrote it was killed.
    pub truncated: bool,
}

/// Why a trace cannot be written, read or replayed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file's name does not say of which format it is.
    #[error("{0}: the name must end in .parquet, .arrow (IPC file) or .arrows (IPC stream)")]
    Format(String),
    /// The file cannot be reached.
    #[error("{path}: {source}")]
    File {
        /// Which file.
        path: String,
        /// Why not.
        source: std::io::Error,
    },
    /// What was read is no trace.
    #[error("{0}")]
    Invalid(String),
    /// What was written could not be encoded.
    #[error("{path}: {what}")]
    Encoding {
        /// Which file.
        path: String,
        /// Why not.
        what: String,
    },
}
