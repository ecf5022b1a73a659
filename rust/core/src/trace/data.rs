//! A trace in memory, and the errors of traces.

use super::about::About;
use crate::error::Failure;
use crate::events::event::Event;

/// Recorded requests, and the machine that they are from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The machine.
    pub about: About,
    /// The requests, in the order in which they were completed.
    pub events: Vec<Event>,
    /// Whether it was read from an IPC stream without an end mark: its writer was killed, or is still writing.
    pub truncated: bool,
}

/// Why a trace cannot be written, read or replayed.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file's name has no extension of a known format.
    #[error("{0}: the name must end in .parquet, .arrow (IPC file) or .arrows (IPC stream)")]
    Format(String),
    /// The file cannot be opened, read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file or table is not a trace.
    #[error("{0}")]
    Invalid(String),
    /// It is a pipe whose reader has stalled, or never came.
    #[error("{0}: nobody reads it")]
    Stalled(String),
    /// The watch of what takes long failed: the caller wants no more of it.
    #[error("{0}")]
    Interrupted(Failure),
    /// The events could not be encoded.
    #[error("{path}: {what}")]
    Encoding {
        /// The file.
        path: String,
        /// The encoder's error.
        what: String,
    },
}
