//! A virtual machine, assembled from everything below.
//!
//! - [`config`]: what it is made of; [`assembly`]: the machine
//! - `start`: images and registers before a run; `run`: a run; [`report`]: what it did

pub mod assembly;
pub mod config;
pub mod report;
mod run;
mod start;
