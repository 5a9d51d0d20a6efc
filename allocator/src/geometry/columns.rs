//! A set of columns of a GPU's placement axis.

use std::ops::{BitAnd, BitOr, BitOrAssign, Not};

/// A set of columns of a placement axis of up to 64 columns, one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Columns(u64);

impl Columns {
    /// The longest placement axis there is room for.
    pub const MAX: u32 = 64;
    /// No column.
    pub const NONE: Self = Self(0);

    /// The columns `start .. start + size`; none if the span leaves the axis or is empty.
    pub fn span(start: u32, size: u32) -> Option<Self> {
        let end = start.checked_add(size)?;
        if size == 0 || end > Self::MAX {
            return None;
        }
        Some(Self((u64::MAX >> (Self::MAX - size)) << start))
    }

    /// Whether some column is in both sets.
    pub fn overlaps(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether no column is in the set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many columns are in the set.
    pub fn count(self) -> u32 {
        self.0.count_ones()
    }
}

impl BitOr for Columns {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Columns {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl BitAnd for Columns {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Not for Columns {
    type Output = Self;
    fn not(self) -> Self {
        Self(!self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spans_stay_on_the_axis() {
        assert_eq!(Columns::span(0, 64).map(Columns::count), Some(64));
        assert_eq!(Columns::span(63, 1).map(Columns::count), Some(1));
        assert_eq!(Columns::span(63, 2), None);
        assert_eq!(Columns::span(0, 0), None);
        assert_eq!(Columns::span(u32::MAX, 2), None);
    }

    proptest! {
        #[test]
        fn spans_overlap_as_intervals_do(a in 0u32..64, m in 1u32..64, b in 0u32..64, n in 1u32..64) {
            if let (Some(x), Some(y)) = (Columns::span(a, m), Columns::span(b, n)) {
                prop_assert_eq!(x.overlaps(y), a < b + n && b < a + m);
                prop_assert_eq!((x | y).count() + (x & y).count(), m + n);
            }
        }
    }
}
