//! `reservations` and `admin reserve`: space on GPUs that is set aside for a time.

use super::{
    Outcome, bad_request, completion,
    jobs::parse_seconds,
    output::{self, Output, local_time, plain},
    parse_need,
};
use crate::{
    api::{Need, NewReservation, Reservation},
    client::Client,
};
use clap::{Args, Subcommand, builder::ValueParser};
use clap_complete::ArgValueCandidates;
use jiff::{SignedDuration, Timestamp, civil, tz::TimeZone};

/// Space that is set aside, for administrators.
#[derive(Debug, Subcommand)]
pub(super) enum ReserveCommand {
    /// Set space aside for users or projects; nobody else has it in that time.
    Add(ReserveArguments),
    /// List what is set aside.
    #[command(visible_alias = "list")]
    Ls,
    /// Set it aside no longer; what runs in it goes on until its end.
    #[command(visible_alias = "remove")]
    Rm {
        /// Its name.
        name: String,
    },
}

/// What is to be set aside.
#[derive(Debug, Args)]
pub(super) struct ReserveArguments {
    /// Its name.
    name: String,
    /// When it begins: 2026-12-01T09:00, 2026-12-01T09:00:00+09:00, or 30m, 12h, 2d from now [default: now].
    #[arg(long, value_parser = ValueParser::new(parse_time), value_name = "TIME")]
    from: Option<Timestamp>,
    /// When it ends.
    #[arg(long, value_parser = ValueParser::new(parse_time), value_name = "TIME", required_unless_present = "length")]
    to: Option<Timestamp>,
    /// How long it is, instead: 90m, 12h, 2d.
    #[arg(long = "for", id = "length", value_parser = ValueParser::new(parse_seconds), value_name = "TIME",
          conflicts_with = "to")]
    length: Option<u64>,
    /// What each of its slices is: a profile (3g.20gb), an amount of memory (10G), or gpu for whole ones.
    #[arg(long, short, value_parser = ValueParser::new(parse_need), value_name = "NEED")]
    gpu: Need,
    /// How many.
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    slices: u32,
    /// Who may use it. Repeat for more, or separate them with commas.
    #[arg(long = "user", value_delimiter = ',', add = ArgValueCandidates::new(completion::users), value_name = "USER")]
    users: Vec<String>,
    /// For which project it may be used. Repeat for more, or separate them with commas.
    #[arg(long = "project", value_delimiter = ',', value_name = "PROJECT")]
    projects: Vec<String>,
}

/// Those that the caller may use.
pub(super) async fn mine(client: &Client, output: &Output) -> Outcome {
    let list = client.reservations().await?;
    output.show(&list, |list| table(&list.reservations, "nothing is reserved for you"))
}

pub(super) async fn administer(client: &Client, output: &Output, command: ReserveCommand) -> Outcome {
    match command {
        ReserveCommand::Ls => {
            let list = client.all_reservations().await?;
            output.show(&list, |list| table(&list.reservations, "nothing is reserved: mlad admin reserve add NAME"))
        }
        ReserveCommand::Add(arguments) => {
            let made = client.reserve(&new(arguments)?).await?;
            output.say(&made, |made| {
                let (from, until) = (local_time(made.from), local_time(made.until));
                format!("reserved {} times {} from {from} to {until}: {}", made.slices, made.need, places(made))
            })
        }
        ReserveCommand::Rm { name } => {
            client.remove_reservation(&name).await?;
            output.done("reservation.remove", &name, "removed the reservation")
        }
    }
}

fn new(arguments: ReserveArguments) -> Result<NewReservation, super::CliError> {
    let ReserveArguments { name, from, to, length, gpu, slices, users, projects } = arguments;
    let after = |seconds: u64| {
        let seconds = i64::try_from(seconds).ok()?;
        from.unwrap_or_else(Timestamp::now).checked_add(SignedDuration::from_secs(seconds)).ok()
    };
    let until = to.or_else(|| length.and_then(after)).ok_or_else(|| bad_request("--for: that is too long"))?;
    if users.is_empty() && projects.is_empty() {
        return Err(bad_request("say whom it is for: --user NAME or --project NAME"));
    }
    Ok(NewReservation { name, need: gpu, slices, from, until, users, projects })
}

fn table(reservations: &[Reservation], empty: &str) -> String {
    let rows = reservations.iter().map(|reservation| {
        let people = reservation.users.iter().chain(&reservation.projects);
        let state = match (&reservation.trouble, reservation.active) {
            (Some(trouble), _) => format!("not kept: {trouble}"),
            (None, true) => format!("now, {} in use", reservation.in_use),
            (None, false) => "later".to_owned(),
        };
        [
            reservation.name.clone(),
            format!("{} x {}", reservation.slices, reservation.need),
            local_time(reservation.from),
            local_time(reservation.until),
            people.cloned().collect::<Vec<_>>().join(","),
            places(reservation),
            plain(&state),
        ]
    });
    output::table(["NAME", "GPU", "FROM", "TO", "FOR", "PLACES", "STATE"], rows.collect(), empty)
}

/// The GPUs it is on, each with how many of its slices.
fn places(reservation: &Reservation) -> String {
    let mut gpus: Vec<(String, u32)> = Vec::new();
    for place in &reservation.places {
        let name = format!("{}:{}", place.node, place.gpu_index);
        match gpus.iter_mut().find(|(known, _)| *known == name) {
            Some((_, count)) => *count += 1,
            None => gpus.push((name, 1)),
        }
    }
    let told = gpus.into_iter().map(|(name, count)| if count == 1 { name } else { format!("{name} ({count})") });
    told.collect::<Vec<_>>().join(", ")
}

/// A time with its offset, one of this machine's time zone, or how long from now.
fn parse_time(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    if let Ok(time) = text.parse::<civil::DateTime>() {
        let local = time.to_zoned(TimeZone::system()).map_err(|error| error.to_string())?;
        return Ok(local.timestamp());
    }
    let seconds = parse_seconds(text.strip_prefix('+').unwrap_or(text)).ok().and_then(|s| i64::try_from(s).ok());
    let later = seconds.and_then(|seconds| Timestamp::now().checked_add(SignedDuration::from_secs(seconds)).ok());
    later.ok_or_else(|| "a time is 2026-12-01T09:00, 2026-12-01T09:00:00+09:00, or 30m, 12h, 2d from now".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        let utc = parse_time("2026-12-01T09:00:00+09:00").unwrap();
        assert_eq!(utc.to_string(), "2026-12-01T00:00:00Z");
        assert!(parse_time("2026-12-01T09:00").is_ok() && parse_time("2026-12-01 09:00").is_ok());
        let soon = parse_time("30m").unwrap().duration_since(Timestamp::now()).as_secs();
        assert!((1700..=1800).contains(&soon), "{soon}");
        for wrong in ["", "tomorrow", "9:00", "2026-13-01T09:00"] {
            assert!(parse_time(wrong).is_err(), "{wrong}");
        }
    }
}
