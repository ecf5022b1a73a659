//! What a CPU's state is made of: registers by name, segments, CPUID.

pub mod cpuid;
pub mod registers;
