//! A set of pages as disjoint ranges.

use super::address::Range;

/// The fewest possible ranges, ascending: neighbouring ones are joined. So there are never more than half as many as pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RangeSet(Vec<Range>);

impl RangeSet {
    pub(super) fn ranges(&self) -> &[Range] {
        &self.0
    }

    pub(super) fn add(&mut self, range: Range) {
        // Those that overlap it or touch it.
        let first = self.0.partition_point(|other| other.end() < range.gpa());
        let end = self.0.partition_point(|other| other.gpa() <= range.end());
        let joined = self.0[first..end].iter().fold(range, |all, other| all.hull(other));
        self.0.splice(first..end, [joined]);
    }

    /// Takes out the pages of `range`; returns those that were in it.
    pub(super) fn take(&mut self, range: Range) -> Vec<Range> {
        let first = self.0.partition_point(|other| other.end() <= range.gpa());
        let end = self.0.partition_point(|other| other.gpa() < range.end());
        let taken = self.0[first..end].iter().filter_map(|other| other.intersect(&range));
        let taken = taken.collect();
        // Of the first and of the last a part may stay.
        let below = |other: &Range| Range::new(other.gpa(), range.gpa().checked_sub(other.gpa())?);
        let above = |other: &Range| Range::new(range.end(), other.end().checked_sub(range.end())?);
        let left = self.0[first..end].iter().flat_map(|other| [below(other), above(other)]);
        let left: Vec<Range> = left.flatten().collect();
        self.0.splice(first..end, left);
        taken
    }
}

#[cfg(test)]
mod tests;
