//! What a guest starts with, in memory and in registers.
//!
//! - [`image`]: raw images and ELF files; [`script_guest`]: the guest that executes scripts
//! - [`long_mode`]: page tables and the GDT; [`start`]: registers

pub mod image;
pub mod long_mode;
pub mod script_guest;
pub mod start;
