//! What NVIDIA's numbers of critical errors (XID) mean for a GPU, by NVIDIA's catalog of XID errors.

/// What is wrong with a GPU that reported an error, in words; none for errors that an application makes, or that are
/// over with the application (13, 31, 43, 45, 94 …), and for a GPU that fell off the bus (79): that one cannot be read
/// until it is reset.
pub(crate) fn trouble(xid: u64) -> Option<String> {
    let what = match xid {
        48 => "an error of its memory that could not be corrected",
        62 => "its micro-controller halted",
        64 => "a row of its memory could not be remapped",
        74 => "an error of NVLink",
        92 => "too many errors of its memory",
        95 => "an error of its memory that was not contained",
        110 => "a fault of its security",
        119 | 120 => "its system processor does not answer",
        140 => "an error of its memory that it did not recover from",
        143 => "it could not be initialised",
        _ => return None,
    };
    Some(format!("{what} (XID {xid})"))
}

/// The number for an error of memory that could not be corrected, where the driver tells of it without one.
pub(super) const DOUBLE_BIT: u64 = 48;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_application_does_is_no_trouble_of_its_gpu() {
        for xid in [13, 31, 43, 45, 79, 94] {
            assert_eq!(trouble(xid), None);
        }
        assert!(trouble(95).unwrap().contains("XID 95"));
        assert!(trouble(DOUBLE_BIT).is_some());
    }
}
