//! Traces: recorded requests.

pub(crate) mod recorded;
pub(crate) mod recorder;
pub(crate) mod replay;
