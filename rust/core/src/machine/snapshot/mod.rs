//! A machine that is put aside, and one that goes on from there.
//!
//! - `folder`: a folder that is whole or not there; `manifest`: what is in it; `save`, `resume`: both ways

mod folder;
pub(super) mod manifest;
pub mod resume;
mod save;
