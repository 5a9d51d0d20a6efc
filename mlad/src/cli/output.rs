//! How things look: tables, JSON, times, sizes; never a decoration where a program listens.

use super::{CliError, DONE, Outcome};
use comfy_table::{ContentArrangement, Table, presets};
use jiff::{Timestamp, Unit};
use serde::Serialize;
use std::io::{self, IsTerminal as _, Write as _};

/// How this run prints.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    json: bool,
}

/// What was done, to what.
#[derive(Serialize)]
struct Done<'a> {
    done: &'static str,
    target: &'a str,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether a program reads standard output.
    pub(super) fn is_json(self) -> bool {
        self.json
    }

    /// Whether a person watches standard error, so that progress may be drawn there.
    pub(super) fn draws_progress(self) -> bool {
        !self.json && io::stderr().is_terminal()
    }

    /// The value as JSON, or what `table` makes of it.
    pub(super) fn show<T: Serialize>(self, value: &T, table: impl FnOnce(&T) -> String) -> Outcome {
        if self.json {
            print_json(value)?
        } else {
            print_text(&table(value))?
        }
        DONE
    }

    /// If JSON is wanted, one document: the value for one thing that was asked for, an array for several.
    pub(super) fn one_document<T: Serialize>(self, several: bool, values: &[T]) -> Result<(), CliError> {
        match values {
            _ if !self.json => Ok(()),
            values if several => print_json(values),
            values => values.iter().try_for_each(print_json),
        }
    }

    /// That something was done which the API has no more to say about: in the words of the audit log as JSON, or
    /// a sentence.
    pub(super) fn done(self, action: &'static str, target: &str, sentence: &str) -> Outcome {
        self.say(&Done { done: action, target }, |_| format!("{sentence} {}", plain(target)))
    }

    /// The value as JSON, or a sentence.
    pub(super) fn say<T: Serialize>(self, value: &T, sentence: impl FnOnce(&T) -> String) -> Outcome {
        self.show(value, |value| sentence(value) + "\n")
    }
}

fn print_json<T: Serialize + ?Sized>(value: &T) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| CliError::Io { doing: "printing".into(), source: error.into() })?;
    print_text(&(text + "\n"))
}

/// Writes to standard output; a reader that has gone is no fault.
pub(super) fn print_text(text: &str) -> Result<(), CliError> {
    print_bytes(text.as_bytes())
}

/// Writes to standard output at once.
pub(super) fn print_bytes(bytes: &[u8]) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => CliError::OutputClosed,
        _ => CliError::Io { doing: "writing to standard output".into(), source: error },
    })
}

/// Columns of the terminal that standard output is; none if it is none.
pub(super) fn width() -> Option<usize> {
    let out = io::stdout();
    let size = rustix::termios::tcgetwinsize(&out).ok().filter(|_| out.is_terminal())?;
    (size.ws_col > 0).then_some(usize::from(size.ws_col))
}

/// A table without lines; empty rows give the sentence instead.
pub(super) fn table<const N: usize>(head: [&str; N], rows: Vec<[String; N]>, empty: &str) -> String {
    if rows.is_empty() {
        return format!("{empty}\n");
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head);
    if io::stdout().is_terminal() {
        table.set_content_arrangement(ContentArrangement::Dynamic);
    }
    for row in rows {
        table.add_row(row.map(|cell| plain(&cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    text.lines().fold(String::new(), |out, line| out + line.trim_end() + "\n")
}

/// Text from elsewhere without control characters, which could play tricks on a terminal.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The word that an enum of the API is written as in JSON.
pub(super) fn word<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        _ => String::new(),
    }
}

/// `-` for what is not known.
pub(super) fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

/// How long ago (or from now) something is: `3m`, `in 2h`.
pub(super) fn ago(time: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(time).as_secs();
    if seconds < 0 { format!("in {}", span(-seconds)) } else { span(seconds) }
}

/// A length of time in at most two units.
pub(super) fn span(seconds: i64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m{:02}s", seconds % 60),
        (0, hours, minutes) => format!("{hours}h{minutes:02}m"),
        (days, hours, _) => format!("{days}d{hours:02}h"),
    }
}

/// A time in the person's zone, to the second.
pub(super) fn local_time(time: Timestamp) -> String {
    let zoned = time.round(Unit::Second).unwrap_or(time).to_zoned(jiff::tz::TimeZone::system());
    zoned.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// MiB for people.
pub(super) fn memory(mib: u64) -> String {
    match mib {
        0 => "-".into(),
        1..=1023 => format!("{mib} MiB"),
        _ => format!("{}.{} GiB", mib / 1024, mib % 1024 * 10 / 1024),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_are_short() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (61, "1m01s"), (3600, "1h00m"), (90_000, "1d01h")] {
            assert_eq!(span(seconds), text);
        }
        let now = Timestamp::from_second(1_000_000).unwrap();
        assert_eq!(ago(Timestamp::from_second(999_990).unwrap(), now), "10s");
        assert_eq!(ago(Timestamp::from_second(1_000_060).unwrap(), now), "in 1m00s");
    }

    #[test]
    fn tables_have_no_trailing_blanks_and_no_control_characters() {
        let text = table(["A", "B"], vec![["1".into(), "x\u{1b}[31m".into()]], "none");
        assert_eq!(text, "A  B\n1  x\u{fffd}[31m\n");
        assert_eq!(table::<2>(["A", "B"], vec![], "none"), "none\n");
    }

    #[test]
    fn memory_reads_well() {
        assert_eq!(memory(0), "-");
        assert_eq!(memory(512), "512 MiB");
        assert_eq!(memory(4864), "4.7 GiB");
    }
}
