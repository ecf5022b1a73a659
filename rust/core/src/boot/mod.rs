//! What is in memory and in the registers before a guest starts.

pub mod image;
pub mod long_mode;
pub mod script_guest;
pub mod start;
