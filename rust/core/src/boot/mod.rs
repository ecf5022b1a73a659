//! What a guest starts with, in memory and in registers.
//!
//! - [`kernel_file`]: the file of a Linux kernel, and its symbols; [`running_kernel`]: the same where it runs
//! - [`linux`]: a Linux guest in memory; [`acpi`]: its ACPI tables
//! - [`image`]: raw images and ELF files; [`script_guest`]: the guest that executes scripts
//! - [`long_mode`]: page tables and the GDT; [`start`]: registers

pub mod acpi;
pub mod image;
pub mod kernel_file;
pub mod linux;
pub mod long_mode;
pub mod running_kernel;
pub mod script_guest;
pub mod start;
