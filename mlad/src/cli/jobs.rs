//! `submit`, `ps`, `logs`, `wait`, `cancel`, `hold`, `release`; what a job is to be, and how it ended.

use super::{
    CliError, DONE, Outcome, bad_request, completion, explain,
    follow::{self, Patience},
    output,
    output::{Output, ago, or_dash},
    parse_need,
};
use crate::{
    api::{Job, JobId, JobSpec, JobState, Need},
    client::{Client, ClientError, JobQuery},
};
use clap::{Args, builder::ValueParser};
use clap_complete::ArgValueCandidates;
use jiff::Timestamp;
use std::{collections::BTreeMap, path::PathBuf};

/// What a job is to be.
#[derive(Debug, Args)]
pub(super) struct SubmitArguments {
    /// Slice: a profile (2g.10gb), an amount of memory (10G), gpu or cpu [default: the workspace's].
    #[arg(long, short, value_parser = ValueParser::new(parse_need), value_name = "NEED")]
    pub(super) gpu: Option<Need>,
    /// Memory the slice must have at least (10G); the same as --gpu 10G.
    #[arg(long, conflicts_with = "gpu", value_parser = ValueParser::new(parse_need), value_name = "MEMORY")]
    gpu_mem: Option<Need>,
    /// Image from the catalog [default: the workspace's].
    #[arg(long, short, add = ArgValueCandidates::new(completion::images))]
    image: Option<String>,
    /// Name to find it by [default: the command's first word].
    #[arg(long, short)]
    name: Option<String>,
    /// Project it counts for, or none [default: the workspace's, else yours: `mlad project default`].
    #[arg(long, short, add = ArgValueCandidates::new(completion::projects))]
    project: Option<String>,
    /// So many slices, all at once and on one node [default: 1].
    #[arg(long, value_name = "NUMBER")]
    slices: Option<u32>,
    /// On so many nodes (only 1 is served so far).
    #[arg(long, value_name = "NUMBER")]
    nodes: Option<u32>,
    /// Who asks with more is ahead: -100 up to what you may ask for.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true, value_name = "NUMBER")]
    priority: i32,
    /// It may be ended, with notice, for a request of greater priority; it then waits to start again.
    #[arg(long)]
    preemptible: bool,
    /// Reservation in whose space it runs: it starts when that has begun, and ends with it.
    #[arg(long, value_name = "NAME")]
    reservation: Option<String>,
    /// Longest run: 90s, 30m, 12h, 2d [default: the server's].
    #[arg(long, short, visible_alias = "time-limit", value_parser = ValueParser::new(parse_seconds), value_name = "TIME")]
    time: Option<u64>,
    /// Memory of the container: 8G, 500M [default: the server's].
    #[arg(long, value_parser = ValueParser::new(parse_mib), value_name = "MEMORY")]
    memory: Option<u64>,
    /// Variable for the command; NAME alone takes it from here. Repeat for more.
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Working directory [default: this one, if it is in /home or /datasets, which jobs have too; else the home].
    #[arg(long, short = 'C', value_name = "FOLDER")]
    directory: Option<PathBuf>,
    /// Hand it in, but keep it from starting until `mlad release`.
    #[arg(long)]
    pub(super) hold: bool,
    /// The same key gives the same job back instead of a second one.
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// The command, after `--`.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub(super) command: Vec<String>,
}

/// Which jobs to list.
#[derive(Debug, Args)]
pub(super) struct PsArguments {
    /// Those that have ended too.
    #[arg(long, short)]
    all: bool,
    /// Those of this user, `*` for everybody's (administrators).
    #[arg(long)]
    user: Option<String>,
    /// At most so many.
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// Those with smaller numbers than this: the next page.
    #[arg(long, value_name = "ID")]
    before: Option<JobId>,
}

/// Whose output, and from where.
#[derive(Debug, Args)]
pub(super) struct LogsArguments {
    /// The job's number.
    #[arg(add = ArgValueCandidates::new(completion::job_ids))]
    id: JobId,
    /// Go on until the job has ended.
    #[arg(long, short)]
    follow: bool,
    /// Begin at this byte.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=i64::MAX.unsigned_abs()))]
    offset: u64,
}

pub(super) async fn submit(client: &Client, output: &Output, arguments: SubmitArguments) -> Outcome {
    let id = hand_in(client, &mut Patience::of_a_person(), arguments).await?;
    output.say(&crate::api::JobSubmitted { id }, |job| job.id.to_string())
}

pub(super) async fn ps(client: &Client, output: &Output, arguments: PsArguments) -> Outcome {
    let PsArguments { all, user, limit, before } = arguments;
    let with_user = user.is_some();
    let jobs = client.jobs(&JobQuery { all, user, limit: Some(limit), before, state: None }).await?;
    let now = Timestamp::now();
    output.show(&jobs, |list| {
        let rows = list.jobs.iter().map(|job| row(job, with_user, now)).collect();
        let empty = if all { "no jobs" } else { "no jobs that have not ended (mlad ps --all shows the others)" };
        let who = if with_user { "USER" } else { "NAME" };
        let head = ["ID", who, "STATE", "GPU", "PROJECT", "PRIORITY", "IMAGE", "AGE", "TIME", "EXIT"];
        let mut text = output::table(head, rows, empty);
        if let Some(before) = list.next_before {
            text += &format!("more: mlad ps{} --before {before}\n", if all { " --all" } else { "" });
        }
        text
    })
}

fn row(job: &Job, with_user: bool, now: Timestamp) -> [String; 10] {
    let ran = job.started_at.map(|start| ago(start, job.ended_at.unwrap_or(now)));
    let exit = match (&job.signal, job.exit_code) {
        (Some(signal), _) => format!("SIG{signal}"),
        (None, code) => or_dash(code),
    };
    [
        job.id.to_string(),
        if with_user { job.user.clone() } else { job.name.chars().take(32).collect() },
        state_text(job),
        slices_text(job),
        or_dash(job.spec.project.as_ref()),
        job.spec.priority.to_string(),
        or_dash(job.spec.image.as_ref()),
        ago(job.submitted_at, now),
        or_dash(ran),
        exit,
    ]
}

/// What it runs on in one cell: `2 × 1g.5gb`.
fn slices_text(job: &Job) -> String {
    let need = or_dash(job.spec.need.as_ref());
    match job.spec.slices {
        Some(slices) if slices > 1 => format!("{slices} × {need}"),
        _ => need,
    }
}

/// State and reason in one cell: `queued (NoSlice)`.
pub(super) fn state_text(job: &Job) -> String {
    match &job.reason {
        Some(reason) => format!("{} ({})", output::word(&job.state), output::word(reason)),
        None => output::word(&job.state),
    }
}

pub(super) async fn logs(client: &Client, arguments: LogsArguments) -> Outcome {
    let LogsArguments { id, offset, follow } = arguments;
    follow::copy_log(client, &mut Patience::new(), id, offset, follow).await?;
    DONE
}

pub(super) async fn wait(client: &Client, output: &Output, ids: &[JobId]) -> Outcome {
    let mut patience = Patience::new();
    let (mut jobs, mut faults) = (Vec::new(), Faults::default());
    for id in ids {
        match follow::ended(client, &mut patience, *id).await {
            Ok(job) => {
                say_how_it_ended(output, &job);
                jobs.push(job);
            }
            Err(error) => faults.add(error),
        }
    }
    output.one_document(ids.len() > 1, &jobs)?;
    faults.or(jobs.last().map_or(0, Job::own_exit_code))
}

pub(super) async fn cancel(client: &Client, output: &Output, ids: &[JobId]) -> Outcome {
    each(ids, output, async |id| client.cancel(id).await).await
}

pub(super) async fn hold(client: &Client, output: &Output, ids: &[JobId]) -> Outcome {
    each(ids, output, async |id| client.hold(id).await).await
}

pub(super) async fn release(client: &Client, output: &Output, ids: &[JobId]) -> Outcome {
    each(ids, output, async |id| client.release(id).await).await
}

/// Does it to every job, also when one fails; the last failure decides the exit code.
async fn each(ids: &[JobId], output: &Output, action: impl AsyncFn(JobId) -> Result<Job, ClientError>) -> Outcome {
    let (mut jobs, mut faults) = (Vec::new(), Faults::default());
    for id in ids {
        match action(*id).await {
            Ok(job) => {
                if !output.is_json() {
                    output::print_text(&format!("job {}: {}\n", job.id, state_text(&job)))?;
                }
                jobs.push(job);
            }
            Err(error) => faults.add(error.into()),
        }
    }
    output.one_document(ids.len() > 1, &jobs)?;
    faults.or(0)
}

/// What went wrong while others went well: every fault is told, the last decides the exit code.
#[derive(Default)]
struct Faults(Option<CliError>);

impl Faults {
    fn add(&mut self, error: CliError) {
        if let Some(earlier) = self.0.replace(error) {
            explain(&earlier);
        }
    }

    fn or(self, code: u8) -> Outcome {
        self.0.map_or(Ok(code), Err)
    }
}

pub(super) async fn hand_in(
    client: &Client,
    patience: &mut Patience,
    arguments: SubmitArguments,
) -> Result<JobId, CliError> {
    let spec = spec(arguments)?;
    // The key makes a repeated call harmless when the answer to the first was lost.
    Ok(follow::persist(patience, || client.submit(&spec)).await?.id)
}

fn spec(arguments: SubmitArguments) -> Result<JobSpec, CliError> {
    Ok(JobSpec {
        command: arguments.command,
        name: arguments.name,
        need: arguments.gpu.or(arguments.gpu_mem),
        image: arguments.image,
        working_directory: working_directory(arguments.directory)?,
        environment: environment(&arguments.env)?,
        time_limit_seconds: arguments.time,
        memory_mib: arguments.memory,
        hold: arguments.hold,
        project: arguments.project,
        slices: arguments.slices,
        nodes: arguments.nodes,
        priority: arguments.priority,
        preemptible: arguments.preemptible,
        reservation: arguments.reservation,
        idempotency_key: Some(arguments.key.unwrap_or_else(random_key)),
    })
}

/// A key nobody else has. From std's seed of its hash maps, since a file worker's view has no `/dev`.
fn random_key() -> String {
    use std::hash::{BuildHasher as _, RandomState};
    let half = |salt: u8| RandomState::new().hash_one((salt, std::process::id(), Timestamp::now()));
    format!("{:016x}{:016x}", half(0), half(1))
}

/// Where the job starts: a folder that its container has too.
fn working_directory(wanted: Option<PathBuf>) -> Result<Option<String>, CliError> {
    let here = std::env::current_dir();
    let path = match (wanted, here) {
        (Some(path), Ok(here)) => here.join(path),
        (Some(path), Err(_)) => path,
        (None, Ok(here)) if ["/home", "/datasets"].iter().any(|root| here.starts_with(root)) => here,
        (None, _) => return Ok(None),
    };
    path.into_os_string().into_string().map(Some).map_err(|_| bad_request("the working directory's name is not UTF-8"))
}

fn environment(variables: &[String]) -> Result<BTreeMap<String, String>, CliError> {
    variables
        .iter()
        .map(|variable| match variable.split_once('=') {
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => std::env::var(variable).map(|value| (variable.clone(), value)).map_err(|_| {
                bad_request(format!("--env {variable}: there is no such variable here; say --env {variable}=VALUE"))
            }),
        })
        .collect()
}

/// Says how the job ended, on standard error, where that is not a plain exit code. The job as JSON says it too.
pub(super) fn say_how_it_ended(output: &Output, job: &Job) {
    if job.state != JobState::Succeeded && (job.exit_code.is_none() || job.detail.is_some()) && !output.is_json() {
        let detail = job.detail.as_deref().map(output::plain).unwrap_or_default();
        eprintln!("mlad: job {} {}{}{detail}", job.id, state_text(job), if detail.is_empty() { "" } else { ": " });
    }
}

/// `90`, `90s`, `30m`, `12h`, `2d` in seconds.
pub(super) fn parse_seconds(text: &str) -> Result<u64, String> {
    let (number, unit) = split_unit(text);
    let factor = match unit {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(format!("`{text}` is no length of time: say 90s, 30m, 12h or 2d")),
    };
    number
        .and_then(|number| number.checked_mul(factor))
        .filter(|seconds| *seconds > 0)
        .ok_or_else(|| format!("`{text}` is no length of time: say 90s, 30m, 12h or 2d"))
}

/// `500M`, `8G` in MiB.
pub(super) fn parse_mib(text: &str) -> Result<u64, String> {
    let (number, unit) = split_unit(text);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "m" | "mb" | "mib" => 1,
        "g" | "gb" | "gib" => 1024,
        _ => return Err(format!("`{text}` is no amount of memory: say 500M or 8G")),
    };
    number
        .and_then(|number| number.checked_mul(factor))
        .filter(|mib| *mib > 0)
        .ok_or_else(|| format!("`{text}` is no amount of memory: say 500M or 8G"))
}

fn split_unit(text: &str) -> (Option<u64>, &str) {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    (digits.parse().ok(), text.strip_prefix(digits).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_memory_read_from_text() {
        assert_eq!(parse_seconds("90"), Ok(90));
        assert_eq!(parse_seconds("12h"), Ok(43_200));
        assert_eq!(parse_mib("8G"), Ok(8192));
        for text in ["", "h", "0s", "-1m", "5x", "99999999999999999999d"] {
            assert!(parse_seconds(text).is_err(), "{text}");
        }
        for text in ["", "8", "0G", "G"] {
            assert!(parse_mib(text).is_err(), "{text}");
        }
    }

    #[test]
    fn variables_are_taken_as_given() {
        let map = environment(&["A=1=2".into(), "PATH".into()]).unwrap();
        assert_eq!(map.get("A").unwrap(), "1=2");
        assert!(map.contains_key("PATH"));
        assert!(environment(&["NO_SUCH_VARIABLE_HERE".into()]).is_err());
    }

    #[test]
    fn keys_differ() {
        assert_ne!(random_key(), random_key());
    }
}
