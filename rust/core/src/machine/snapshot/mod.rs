//! A machine that is put aside, and one that goes on from there.
//!
//! - `folder`: a folder that is whole or not there; `manifest`: what is in it; `save`, `resume`: both ways; `reset`: back to one

mod folder;
pub(super) mod manifest;
mod reset;
pub mod resume;
mod save;
