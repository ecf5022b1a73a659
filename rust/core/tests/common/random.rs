//! Numbers that look random, for tests.
#![allow(missing_docs)]

/// Xorshift: the same numbers in each run of the test. It starts from anything but 0.
pub struct Random(pub u64);

impl Random {
    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}
