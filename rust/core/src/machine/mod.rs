//! A virtual machine, assembled from everything below.
//!
//! - [`config`]: the parameters, and their checks; `choice`: what this host gives for them; [`assembly`]: the machine
//! - `pc`: the devices of a PC; `devices`: their threads during a run; `boot`: Linux before its first run
//! - `start`: images and registers before a run; [`run`]: a run with its threads; `entering`: what ends it before they run;
//!   [`current`]: the run in progress; [`report`]: what a run did
//! - `paging`: the thread that gives missing pages their bytes
//! - [`snapshot`]: a machine that is put aside, and goes on

pub mod assembly;
mod boot;
mod choice;
pub mod config;
pub mod current;
mod devices;
mod entering;
mod paging;
mod pc;
pub mod report;
pub mod run;
pub mod snapshot;
mod start;
