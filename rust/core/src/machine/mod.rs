//! A virtual machine, assembled from everything below.
//!
//! - [`config`]: the parameters, and their checks; [`assembly`]: the machine
//! - `start`: images and registers before a run; `run`: a run with its threads; [`report`]: what a run did

pub mod assembly;
pub mod config;
pub mod report;
mod run;
mod start;
