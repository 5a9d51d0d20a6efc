//! When something is to end, as a person says it: in so long, or on a day.

use jiff::{Span, SpanRelativeTo, Timestamp, civil::DateTime, tz::TimeZone};

/// A time to come: `90d`, `12h`, `2 weeks` from now, a date (`2027-03-01`, its beginning) or a date and time
/// (`2027-03-01T18:00`) in the zone of this machine, or one with a zone of its own (`2027-03-01T18:00Z`).
pub(super) fn parse_expiry(text: &str) -> Result<Timestamp, String> {
    parse(text, Timestamp::now(), &TimeZone::system())
}

fn parse(text: &str, now: Timestamp, zone: &TimeZone) -> Result<Timestamp, String> {
    let text = text.trim();
    let time = if let Ok(span) = text.parse::<Span>() {
        let length = span.to_duration(SpanRelativeTo::days_are_24_hours());
        let length = length.map_err(|_| format!("{text} has no fixed length: say it in weeks, days or hours"))?;
        now.checked_add(length).map_err(|_| format!("{text} is too long"))?
    } else if let Ok(time) = text.parse::<Timestamp>() {
        time
    } else if let Ok(time) = text.parse::<DateTime>() {
        time.to_zoned(zone.clone()).map_err(|error| error.to_string())?.timestamp()
    } else {
        return Err(format!("{text:?} is neither a length of time (90d, 12h) nor a date (2027-03-01)"));
    };
    if time <= now { Err(format!("{text} is over already")) } else { Ok(time) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expiry_is_a_length_or_a_date() {
        let now: Timestamp = "2026-11-27T12:00:00Z".parse().unwrap();
        let zone = TimeZone::fixed(jiff::tz::offset(9));
        for (text, expected) in [
            ("90d", "2027-02-25T12:00:00Z"),
            ("12h", "2026-11-28T00:00:00Z"),
            (" 2 weeks ", "2026-12-11T12:00:00Z"),
            ("1d12h", "2026-11-29T00:00:00Z"),
            ("2027-03-01", "2027-02-28T15:00:00Z"),
            ("2027-03-01T18:00", "2027-03-01T09:00:00Z"),
            ("2027-03-01T18:00Z", "2027-03-01T18:00:00Z"),
        ] {
            assert_eq!(parse(text, now, &zone), Ok(expected.parse().unwrap()), "{text}");
        }
        for wrong in ["", "x", "soon", "-1d", "0s", "1 month", "2026-11-27", "2026-13-01", "99999999w"] {
            assert!(parse(wrong, now, &zone).is_err(), "{wrong}");
        }
    }
}
