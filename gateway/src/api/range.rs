//! Byte ranges (RFC 9110 section 14): the one range of a request, on a file of a known size. Pure.

/// What a `Range` header comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Range {
    /// All of it: no header, or one that need not be understood.
    Whole,
    /// So many bytes from an offset.
    Part {
        /// First byte.
        start: u64,
        /// How many; at least 1.
        length: u64,
    },
    /// No byte of it is there.
    Beyond,
}

/// Reads a header's value. Several ranges, and other units, are answered with the whole: the client must
/// expect that.
pub(super) fn parse(header: Option<&str>, size: u64) -> Range {
    let Some(range) = header.and_then(|value| value.strip_prefix("bytes=")) else { return Range::Whole };
    let Some((first, last)) = range.split_once('-') else { return Range::Whole };
    let number = |text: &str| text.trim().parse::<u64>().ok().filter(|_| !text.contains('+'));
    match (number(first), number(last)) {
        (Some(start), Some(last)) if last < start => Range::Whole,
        (Some(start), _) if start >= size && (last.is_empty() || number(last).is_some()) => Range::Beyond,
        (Some(start), Some(last)) => Range::Part { start, length: last.min(size - 1) - start + 1 },
        (Some(start), None) if last.is_empty() => Range::Part { start, length: size - start },
        (None, Some(0)) if first.is_empty() => Range::Beyond,
        (None, Some(_)) if first.is_empty() && size == 0 => Range::Beyond,
        (None, Some(count)) if first.is_empty() => {
            Range::Part { start: size.saturating_sub(count), length: count.min(size) }
        }
        _ => Range::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_read_as_the_rfc_says() {
        let part = |start, length| Range::Part { start, length };
        for (header, range) in [
            ("bytes=0-0", part(0, 1)),
            ("bytes=2-4", part(2, 3)),
            ("bytes=2-", part(2, 8)),
            ("bytes=-3", part(7, 3)),
            ("bytes=-30", part(0, 10)),
            ("bytes=9-99", part(9, 1)),
            ("bytes=10-", Range::Beyond),
            ("bytes=-0", Range::Beyond),
            ("bytes=4-2", Range::Whole),
            ("bytes=0-1,3-4", Range::Whole),
            ("lines=0-1", Range::Whole),
            ("bytes=a-b", Range::Whole),
            ("bytes=", Range::Whole),
        ] {
            assert_eq!(parse(Some(header), 10), range, "{header}");
        }
        assert_eq!(parse(None, 10), Range::Whole);
        assert_eq!(parse(Some("bytes=0-"), 0), Range::Beyond);
        assert_eq!(parse(Some("bytes=-5"), 0), Range::Beyond);
    }

    proptest! {
        #[test]
        fn a_part_is_inside(header in "bytes=[0-9]{0,20}-[0-9]{0,20}", size in any::<u64>()) {
            if let Range::Part { start, length } = parse(Some(&header), size) {
                prop_assert!(length > 0);
                prop_assert!(start.checked_add(length).is_some_and(|end| end <= size));
            }
        }
    }
}
