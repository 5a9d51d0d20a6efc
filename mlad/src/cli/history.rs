//! `who --at` and `acct`: who held which slice at a time, and what was used.

use super::{
    DONE, Outcome,
    output::{self, Output, local_time, memory, or_dash, plain, print_text},
};
use crate::{
    api::{PastLease, Usage, UsageList},
    client::{Client, UsageQuery},
};
use clap::{Args, ValueEnum, builder::ValueParser};
use jiff::{Span, Timestamp, ToSpan, civil, civil::Date, tz::TimeZone};

/// Days that `acct` goes back to if it is not told.
const DAYS: i64 = 29;

/// What to account for.
#[derive(Debug, Args)]
pub(super) struct AcctArguments {
    /// The first day, UTC: 2026-11-01 [default: 30 days, today included].
    #[arg(long, value_name = "DAY")]
    from: Option<Date>,
    /// The last day [default: today].
    #[arg(long, value_name = "DAY")]
    to: Option<Date>,
    /// What it is told apart by: several with commas.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "user")]
    by: Vec<ByArgument>,
    /// Of this user only.
    #[arg(long)]
    user: Option<String>,
    /// Of this project only.
    #[arg(long)]
    project: Option<String>,
    /// As comma-separated values, for spreadsheets.
    #[arg(long)]
    csv: bool,
}

/// What use is told apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ByArgument {
    /// Days, UTC.
    Day,
    /// Users.
    User,
    /// Projects.
    Project,
}

/// A time in the past, as `--at` takes it.
pub(super) fn at_parser() -> ValueParser {
    ValueParser::new(|text: &str| parse_at(text, Timestamp::now(), &TimeZone::system()))
}

pub(super) async fn who_at(client: &Client, output: &Output, at: Timestamp) -> Outcome {
    let past = client.past(at).await?;
    output.show(&past, |past| {
        let rows = past.leases.iter().map(row).collect();
        let head = ["USER", "WORKLOAD", "PROJECT", "SLICE", "MEMORY", "NODE", "GPU", "FROM", "UNTIL", "UUID"];
        let mut text = output::table(head, rows, "nobody held a slice then");
        if past.incomplete {
            text += "leases that ended long ago are forgotten: this need not be all of them\n";
        }
        text
    })
}

fn row(lease: &PastLease) -> [String; 10] {
    let first = lease.slices.first();
    [
        lease.user.clone(),
        lease.workload.clone(),
        or_dash(lease.project.as_ref()),
        match lease.slices.len() {
            0 | 1 => lease.profile.clone(),
            count => format!("{count} x {}", lease.profile),
        },
        memory(lease.memory_mib),
        or_dash(first.map(|slice| &slice.node)),
        or_dash(first.map(|slice| slice.gpu_index)),
        local_time(lease.granted_at),
        lease.ended_at.map_or_else(|| "now".into(), local_time),
        or_dash(first.map(|slice| &slice.uuid)),
    ]
}

pub(super) async fn acct(client: &Client, output: &Output, arguments: AcctArguments) -> Outcome {
    let today = Timestamp::now().to_zoned(TimeZone::UTC).date();
    let to = arguments.to.unwrap_or(today);
    let from = arguments.from.unwrap_or_else(|| to.saturating_sub(DAYS.days()));
    let by: Vec<String> = arguments.by.iter().map(|by| format!("{by:?}").to_lowercase()).collect();
    let query = UsageQuery { from, to, by: by.join(","), user: arguments.user, project: arguments.project };
    let list = client.usage(&query).await?;
    if arguments.csv {
        print_text(&csv(&list))?;
        return DONE;
    }
    output.show(&list, |list| table(list, &arguments.by))
}

fn table(list: &UsageList, by: &[ByArgument]) -> String {
    let sum = total(&list.usage);
    let mut rows: Vec<[String; 8]> = list.usage.iter().map(|usage| usage_row(usage, by)).collect();
    if rows.len() > 1 {
        let [_, _, _, rest @ ..] = usage_row(&sum, by);
        let [slices, gpus, compute, memory, leases] = rest;
        rows.push(["all".into(), String::new(), String::new(), slices, gpus, compute, memory, leases]);
    }
    let head = ["DAY", "USER", "PROJECT", "SLICE HOURS", "GPU HOURS", "COMPUTE", "MEMORY", "LEASES"];
    let mut text = output::table(head, rows, "nothing was used");
    text += &format!("from {} to {}, UTC", list.from, list.to);
    if list.from < list.kept_since {
        text += &format!("; what was before {} is not kept", list.kept_since);
    }
    text + "\n"
}

fn usage_row(usage: &Usage, by: &[ByArgument]) -> [String; 8] {
    let told = |which: ByArgument, value: Option<String>| match by.contains(&which) {
        true => or_dash(value),
        false => String::new(),
    };
    [
        told(ByArgument::Day, usage.day.map(|day| day.to_string())),
        told(ByArgument::User, usage.user.clone()),
        told(ByArgument::Project, usage.project.clone()),
        hours(usage.slice_seconds),
        hours(usage.gpu_seconds),
        hours(usage.compute_seconds),
        hours(usage.memory_seconds),
        usage.leases.to_string(),
    ]
}

fn total(rows: &[Usage]) -> Usage {
    rows.iter().fold(Usage::default(), |sum, row| Usage {
        slice_seconds: sum.slice_seconds + row.slice_seconds,
        compute_seconds: sum.compute_seconds + row.compute_seconds,
        memory_seconds: sum.memory_seconds + row.memory_seconds,
        gpu_seconds: sum.gpu_seconds + row.gpu_seconds,
        leases: sum.leases + row.leases,
        ..sum
    })
}

fn hours(seconds: u64) -> String {
    format!("{}.{:02}", seconds / 3600, seconds % 3600 / 36)
}

/// RFC 4180; names cannot have a quote, a comma or a line's end.
fn csv(list: &UsageList) -> String {
    let mut text = String::from("day,user,project,slice_seconds,gpu_seconds,compute_seconds,memory_seconds,leases\r\n");
    for usage in &list.usage {
        let name = |name: &Option<String>| name.as_deref().map(plain).unwrap_or_default();
        text += &format!(
            "{},{},{},{},{},{},{},{}\r\n",
            usage.day.map(|day| day.to_string()).unwrap_or_default(),
            name(&usage.user),
            name(&usage.project),
            usage.slice_seconds,
            usage.gpu_seconds,
            usage.compute_seconds,
            usage.memory_seconds,
            usage.leases
        );
    }
    text
}

/// A time in the past: with a zone, in `zone` without one, or so long ago.
fn parse_at(text: &str, now: Timestamp, zone: &TimeZone) -> Result<Timestamp, String> {
    let wrong = || {
        format!(
            "`{}` is no time: 2026-11-27T14:00:00Z, 2026-11-27 14:00 (in the zone of where this runs), or 2h for two hours ago",
            text.escape_debug()
        )
    };
    let text = text.trim();
    let ago = text.strip_prefix('-').unwrap_or(text).trim_end_matches("ago").trim();
    let time = if let Ok(time) = text.parse::<Timestamp>() {
        time
    } else if let Ok(time) = text.parse::<civil::DateTime>() {
        time.to_zoned(zone.clone()).map_err(|_| wrong())?.timestamp()
    } else if let Ok(span) = ago.parse::<Span>() {
        now.to_zoned(zone.clone()).checked_sub(span.abs()).map_err(|_| wrong())?.timestamp()
    } else {
        return Err(wrong());
    };
    match time > now {
        true => Err(format!("{time} has not been yet")),
        false => Ok(time),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_in_the_past_are_read() {
        let now: Timestamp = "2026-11-27T15:00:00Z".parse().unwrap();
        let zone = TimeZone::fixed(jiff::tz::offset(9));
        let read = |text: &str| parse_at(text, now, &zone).map(|time| time.to_string());
        for text in
            ["2026-11-27T13:00:00Z", "2026-11-27T22:00:00+09:00", "2026-11-27 22:00", "2h", "-2h", "2 hours ago"]
        {
            assert_eq!(read(text).as_deref(), Ok("2026-11-27T13:00:00Z"), "{text}");
        }
        assert_eq!(read("2026-11-27").as_deref(), Ok("2026-11-26T15:00:00Z"));
        assert!(read("2026-11-28T00:00:00Z").unwrap_err().contains("not been yet"));
        for text in ["", "yesterday-ish", "25:00", "\u{1b}[2J"] {
            assert!(read(text).is_err_and(|error| !error.contains('\u{1b}')), "{text}");
        }
    }

    #[test]
    fn use_is_a_table_with_a_sum_and_csv() {
        let day: Date = "2026-11-27".parse().unwrap();
        let row = |user: &str, slice_seconds| Usage { user: Some(user.into()), slice_seconds, ..Usage::default() };
        let usage = vec![row("alice", 5400), row("bob", 1800)];
        let list = UsageList { from: day, to: day, kept_since: day, usage };
        let text = table(&list, &[ByArgument::User]);
        assert!(
            text.contains("alice") && text.contains("1.50") && text.contains("all") && text.contains("2.00"),
            "{text}"
        );
        assert_eq!(csv(&list).lines().nth(1), Some(",alice,,5400,0,0,0,0"));
    }
}
