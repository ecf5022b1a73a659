//! A Linux guest in memory: what the 64-bit boot protocol asks for is there, and what cannot be booted is refused.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod acpi_tables;
mod guest;
mod kernels;
mod placed;
mod refused;
