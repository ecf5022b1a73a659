//! Recorded requests: writing them to files while a guest runs, and asking other policies about them later.

mod about;
mod file;
mod recorder;
mod replay;
mod synthetic;

use crate::events::Event;

pub use about::About;
pub use file::Format;
pub use recorder::{Recorded, Recorder};
pub use replay::{Difference, Judged, Replay, ReplayError, replay};
pub use synthetic::synthetic;

/// Requests, and the machine that they were made in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The machine.
    pub about: About,
    /// The requests, in the order in which they were over.
    pub events: Vec<Event>,
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
