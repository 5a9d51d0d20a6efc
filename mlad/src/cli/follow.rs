//! Following a job: what it waits for, then its output, then its end; through lost connections.

use super::{
    CliError, explain,
    output::{Output, ago, print_bytes},
};
use crate::{
    api::{Job, JobId, JobState},
    client::{Answer, Client, ClientError},
};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use std::{future::Future, io::IsTerminal as _, time::Duration};
use tokio::time::{Instant, sleep};

/// How long a gateway that is away is waited for: a restart takes seconds.
const LIMIT: Duration = Duration::from_secs(300);
/// First and longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// A connection that held for so long was one, even if no byte came over it.
const STEADY: Duration = Duration::from_secs(30);

/// The patience of one command with a gateway that is away: how long it is waited for, at which pauses it is
/// tried, and whether that was told.
pub(super) struct Patience {
    limit: Duration,
    pause: Duration,
    away_since: Option<Instant>,
    told: bool,
    /// What is drawn meanwhile, so that what is told does not run into it.
    bar: ProgressBar,
}

impl Patience {
    /// Of a command that people and programs wait for: what it waits for is told in any case.
    pub(super) fn new() -> Self {
        Self { limit: LIMIT, pause: PAUSES.0, away_since: None, told: false, bar: ProgressBar::hidden() }
    }

    /// Of a command that answers at once: what it waits for is told to a person only.
    pub(super) fn of_a_person() -> Self {
        Self { told: !std::io::stderr().is_terminal(), ..Self::new() }
    }

    /// Of a step beside another one, which has told already.
    pub(super) fn silent() -> Self {
        Self { told: true, ..Self::new() }
    }

    /// The gateway is there: the next fault begins anew.
    fn renew(&mut self) {
        (self.pause, self.away_since) = (PAUSES.0, None);
    }

    /// Waits before the next try; gives the error back if there is to be none.
    async fn bear(&mut self, error: ClientError) -> Result<(), ClientError> {
        let now = Instant::now();
        let away = now.duration_since(*self.away_since.get_or_insert(now));
        if !error.is_transient() || away > self.limit {
            return Err(error);
        }
        if !self.told {
            self.told = true;
            self.tell(&format!("mlad: {error}; trying again for {} minutes", self.limit.as_secs() / 60));
        }
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSES.1);
        Ok(())
    }

    fn tell(&self, line: &str) {
        if self.bar.is_hidden() { eprintln!("{line}") } else { self.bar.println(line) }
    }
}

/// Repeats a call that may be repeated while the gateway cannot be reached.
pub(super) async fn persist<T, F>(patience: &mut Patience, mut call: impl FnMut() -> F) -> Result<T, ClientError>
where
    F: Future<Output = Result<T, ClientError>>,
{
    loop {
        match call().await {
            Ok(value) => {
                patience.renew();
                return Ok(value);
            }
            Err(error) => patience.bear(error).await?,
        }
    }
}

/// Shows what the job waits for until it runs, copies its output, and returns the job when it has ended. With
/// JSON only the last.
pub(super) async fn follow(
    client: &Client,
    output: &Output,
    patience: &mut Patience,
    id: JobId,
) -> Result<Job, CliError> {
    if !output.is_json() {
        until_started(client, output, patience, id).await?;
        match copy_log(client, patience, id, 0, true).await {
            // The job can do without being watched.
            Err(CliError::Client(error)) if !error.is_transient() => {
                eprintln!("mlad: the output of job {id} cannot be shown; waiting for its end");
                explain(&error.into());
            }
            copied => copied?,
        }
    }
    ended(client, patience, id).await
}

/// The job when it has ended.
pub(super) async fn ended(client: &Client, patience: &mut Patience, id: JobId) -> Result<Job, CliError> {
    loop {
        // Each call is persisted with by itself: a job may outlast any number of restarts.
        let job = persist(patience, || client.poll_job(id, None)).await?;
        if job.state.has_ended() {
            return Ok(job);
        }
    }
}

/// Copies the log to standard output from `offset`; takes a broken connection up again where it broke.
pub(super) async fn copy_log(
    client: &Client,
    patience: &mut Patience,
    id: JobId,
    offset: u64,
    follow: bool,
) -> Result<(), CliError> {
    let mut offset = offset;
    loop {
        let begun = Instant::now();
        // That a connection was made renews no patience: one that never brings a byte would be made for ever.
        let error = match client.log(id, offset, follow).await {
            Ok(answer) => match copy(answer, patience, &mut offset).await? {
                None => return Ok(()),
                Some(error) => error,
            },
            Err(error) => error,
        };
        if begun.elapsed() >= STEADY {
            patience.renew();
        }
        patience.bear(error).await?;
    }
}

/// Copies one answer; gives back what broke it, if something did.
async fn copy(mut answer: Answer, patience: &mut Patience, offset: &mut u64) -> Result<Option<ClientError>, CliError> {
    loop {
        match answer.next().await {
            Ok(Some(bytes)) => {
                patience.renew();
                print_bytes(&bytes)?;
                *offset = offset.saturating_add(bytes.len() as u64);
            }
            Ok(None) => return Ok(None),
            Err(error) => return Ok(Some(error)),
        }
    }
}

async fn until_started(client: &Client, output: &Output, patience: &mut Patience, id: JobId) -> Result<(), CliError> {
    if output.draws_progress() {
        patience.bar = spinner();
    }
    let started = poll_until_started(client, patience, id).await;
    std::mem::replace(&mut patience.bar, ProgressBar::hidden()).finish_and_clear();
    started
}

async fn poll_until_started(client: &Client, patience: &mut Patience, id: JobId) -> Result<(), CliError> {
    // Not by a call that waits for a change: there may be none for a long time, and its output is there already.
    let mut job = persist(patience, || client.job(id)).await?;
    while matches!(job.state, JobState::Queued | JobState::Held | JobState::Blocked | JobState::Starting) {
        patience.bar.set_message(waiting_line(&job, Timestamp::now()));
        let seen = Some(job.state);
        job = persist(patience, || client.poll_job(id, seen)).await?;
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Endpoint;
    use std::path::Path;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{UnixListener, UnixStream},
    };

    /// A gateway that gives these answers, one a connection, and then is away. An empty one is a connection that
    /// breaks.
    async fn gateway(path: &Path, answers: Vec<String>) -> Client {
        let listener = UnixListener::bind(path).unwrap();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                head(&mut stream).await;
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        Client::new(Endpoint::Unix(path.to_owned()))
    }

    async fn head(stream: &mut UnixStream) {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await.unwrap());
        }
    }

    fn json(state: &str) -> String {
        let body = format!(
            r#"{{"id": 1, "user": "alice", "name": "x", "state": "{state}", "spec": {{"command": ["x"]}},
                "submitted_at": "2026-01-01T00:00:00Z", "attempts": [], "directory": "/"}}"#
        );
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    }

    /// Bears one fault in a row, and no second one.
    fn little() -> Patience {
        Patience { limit: Duration::ZERO, pause: Duration::from_millis(1), ..Patience::silent() }
    }

    #[tokio::test]
    async fn a_wait_outlasts_any_number_of_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let away = String::new;
        let answers = vec![away(), json("running"), away(), json("running"), away(), json("succeeded")];
        let client = gateway(&folder.path().join("socket"), answers).await;
        assert_eq!(ended(&client, &mut little(), 1).await.unwrap().state, JobState::Succeeded);
    }

    #[tokio::test]
    async fn a_log_that_only_breaks_is_not_asked_for_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let broken = || "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
        let client = gateway(&folder.path().join("socket"), vec![broken(); 100]).await;
        let error = copy_log(&client, &mut little(), 1, 0, true).await.unwrap_err();
        assert!(matches!(error, CliError::Client(ClientError::Unreachable { .. })), "{error:?}");

        // One that brings bytes is taken up again at the byte it came to, as often as it breaks.
        let folder = tempfile::tempdir().unwrap();
        let piece = || format!("{}1\r\n\n\r\n", broken());
        let answers = vec![piece(), piece(), piece(), format!("{}0\r\n\r\n", broken())];
        let client = gateway(&folder.path().join("socket"), answers).await;
        copy_log(&client, &mut little(), 1, 0, true).await.unwrap();
    }
}
