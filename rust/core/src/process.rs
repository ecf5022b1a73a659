//! Which process something was made in. A child that was forked has copies of its parent's objects, but not the threads that
//! they refer to; and what they have outside of memory, such as a file's name, is still the parent's.

/// A process.
#[derive(Clone, Copy, Debug)]
pub struct Process(u32);

impl Default for Process {
    /// The present one.
    fn default() -> Self {
        Self(std::process::id())
    }
}

impl Process {
    /// Whether it is the present one, and not one that this one was forked from.
    pub fn is_present(self) -> bool {
        self.0 == std::process::id()
    }
}
