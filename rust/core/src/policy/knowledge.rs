//! What built-in policies know: it is put aside with a machine, and they go on with it.

use serde::{Deserialize, Serialize};

/// What one policy of a chain knows.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub enum Knowledge {
    /// [`RateLimit`](super::rate_limit::RateLimit): how many requests it lets through at once now.
    Tokens(f64),
    /// [`PingPong`](super::ping_pong::PingPong): the ranges that were asked for or converted, the latest first.
    Turns(Vec<Turned>),
}

/// A range whose state changed.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Turned {
    /// Its first gpa.
    pub gpa: u64,
    /// Its bytes.
    pub size: u64,
    /// Whether it was last to become private.
    pub private: bool,
    /// How long ago its state changed, each time, in nanoseconds.
    pub ages: Vec<u64>,
}
