//! Following a job: what it waits for, then its output, then its end; through lost connections.

use super::{
    CliError,
    output::{Output, ago, print_bytes},
};
use crate::{
    api::{Job, JobId, JobState},
    client::{Client, ClientError},
};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use std::{future::Future, time::Duration};
use tokio::time::{Instant, sleep};

/// How long a gateway that is away is waited for: a restart takes seconds.
const PATIENCE: Duration = Duration::from_secs(300);
/// Longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Repeats a call that may be repeated while the gateway cannot be reached, with growing pauses.
pub(super) async fn persist<T, F>(mut call: impl FnMut() -> F) -> Result<T, ClientError>
where
    F: Future<Output = Result<T, ClientError>>,
{
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_millis(200);
    loop {
        match call().await {
            Err(error) if error.is_transient() && Instant::now() < deadline => {
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            result => return result,
        }
    }
}

/// Shows what the job waits for until it runs, copies its output, and returns the job when it has ended.
pub(super) async fn follow(client: &Client, output: &Output, id: JobId) -> Result<Job, CliError> {
    until_started(client, output, id).await?;
    copy_log(client, id, 0, true).await?;
    ended(client, id).await
}

/// The job when it has ended.
pub(super) async fn ended(client: &Client, id: JobId) -> Result<Job, CliError> {
    Ok(persist(|| client.wait_for(id)).await?)
}

/// Copies the log to standard output from `offset`; takes a broken connection up again where it broke.
pub(super) async fn copy_log(client: &Client, id: JobId, offset: u64, follow: bool) -> Result<(), CliError> {
    let mut offset = offset;
    loop {
        let mut answer = persist(|| client.log(id, offset, follow)).await?;
        loop {
            match answer.next().await {
                Ok(Some(bytes)) => {
                    print_bytes(&bytes)?;
                    offset += bytes.len() as u64;
                }
                Ok(None) => return Ok(()),
                Err(error) if error.is_transient() => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

async fn until_started(client: &Client, output: &Output, id: JobId) -> Result<(), CliError> {
    let bar = if output.draws_progress() { spinner() } else { ProgressBar::hidden() };
    let mut seen = None;
    loop {
        let job = persist(|| client.poll_job(id, seen)).await?;
        if !matches!(job.state, JobState::Queued | JobState::Held | JobState::Blocked | JobState::Starting) {
            bar.finish_and_clear();
            return Ok(());
        }
        bar.set_message(waiting_line(&job, Timestamp::now()));
        seen = Some(job.state);
    }
}

fn spinner() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// One line about a job that does not run yet.
fn waiting_line(job: &Job, now: Timestamp) -> String {
    let mut line = format!("job {}: {}", job.id, super::jobs::state_text(job));
    if let Some(place) = job.place {
        line += &format!(", place {place}");
    }
    if let Some(estimate) = job.estimate {
        line += &format!(", perhaps {}", ago(estimate, now));
    }
    if let Some(detail) = &job.detail {
        line += &format!(" ({})", super::output::plain(detail));
    }
    line
}
