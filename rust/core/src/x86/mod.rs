//! x86 itself: registers by name, and CPUID.

pub mod cpuid;
pub mod registers;
