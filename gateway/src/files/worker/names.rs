//! Names of uids and the local time, both learned before the jail closes.

use crate::files::Jail;
use jiff::{Timestamp, ToSpan as _, tz::TimeZone};
use std::collections::BTreeMap;

/// What a listing needs to know of the host.
#[derive(Debug)]
pub(super) struct Names {
    names: BTreeMap<u32, String>,
    zone: TimeZone,
}

impl Names {
    /// Reads the host's time zone.
    pub(super) fn new(jail: &Jail) -> Self {
        Self { names: jail.names.clone(), zone: TimeZone::system() }
    }

    /// The name of a uid or gid.
    pub(super) fn of(&self, id: u32) -> Option<&str> {
        self.names.get(&id).map(String::as_str)
    }

    /// A time as `ls -l` shows it: with the hour within six months, else with the year.
    pub(super) fn time(&self, seconds: i64, now: Timestamp) -> String {
        let Ok(time) = Timestamp::from_second(seconds) else { return "?".into() };
        let recent = now.checked_sub((183 * 24).hours()).is_ok_and(|then| then < time) && time <= now;
        let format = if recent { "%b %e %H:%M" } else { "%b %e  %Y" };
        time.to_zoned(self.zone.clone()).strftime(format).to_string()
    }
}
