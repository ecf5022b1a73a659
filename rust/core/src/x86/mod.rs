//! x86 itself: registers by name, CPUID, instructions as text, and the profile of a software SEV guest.

pub mod cpuid;
pub mod instruction;
pub mod registers;
pub mod sev;
