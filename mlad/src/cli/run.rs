//! `run`: hands a job in, shows its output, and ends as it does. Who ends the command, by a signal or by closing
//! its output, ends the job.

use super::{
    CliError, Outcome, bad_request, explain,
    follow::{self, Patience},
    jobs::{SubmitArguments, hand_in, say_how_it_ended},
    output::Output,
};
use crate::{
    api::{ErrorCode, Job, JobId, JobState},
    client::{Client, ClientError},
};
use std::{pin::pin, time::Duration};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// How long the number of a job is waited for that may or may not have been accepted, so that it can be
/// cancelled.
const LAST_WORD: Duration = Duration::from_secs(10);

pub(super) async fn run(client: &Client, output: &Output, arguments: SubmitArguments) -> Outcome {
    if arguments.hold {
        return Err(bad_request("`mlad run --hold` would wait for ever: use `mlad submit --hold`"));
    }
    // Before anything is handed in: there is no moment at which a signal would end this command and leave a job.
    let mut signals = Signals::listen()?;
    let mut patience = Patience::new();
    let (id, interrupted) = match submitted(client, &mut patience, &mut signals, arguments).await? {
        (Some(id), interrupted) => (id, interrupted),
        (None, code) => {
            eprintln!("mlad: the gateway does not say whether it took the job: `mlad ps` shows it, if it did");
            return Ok(code.unwrap_or_default());
        }
    };
    let mut following = pin!(follow::follow(client, output, &mut patience, id));
    let code = match interrupted {
        Some(code) => code,
        None => tokio::select! {
            ended = &mut following => return conclude(client, output, &mut signals, id, ended).await,
            code = signals.next() => code,
        },
    };
    eprintln!("mlad: cancelling job {id}; press Ctrl-C again to leave it to end by itself");
    let cancelled = async {
        cancel(client, id).await?;
        // Its last words are still shown.
        following.await
    };
    let ended = tokio::select! {
        ended = cancelled => ended,
        _ = signals.next() => return Ok(code),
    };
    match ended {
        // It may have ended by itself just before.
        Ok(job) if job.state != JobState::Cancelled => conclude(client, output, &mut signals, id, Ok(job)).await,
        Ok(job) => {
            output.one_document(false, &[job])?;
            Ok(code)
        }
        Err(error) => Err(error),
    }
}

/// The number of the job; and, if a signal came meanwhile, the exit code of that. No number: it is not known
/// whether there is a job.
async fn submitted(
    client: &Client,
    patience: &mut Patience,
    signals: &mut Signals,
    arguments: SubmitArguments,
) -> Result<(Option<JobId>, Option<u8>), CliError> {
    let mut handing_in = pin!(hand_in(client, patience, arguments));
    let code = tokio::select! {
        id = &mut handing_in => return Ok((Some(id?), None)),
        code = signals.next() => code,
    };
    let id = tokio::select! {
        id = handing_in => Some(id?),
        _ = signals.next() => None,
        () = tokio::time::sleep(LAST_WORD) => None,
    };
    Ok((id, Some(code)))
}

/// Ends as the job did; or, when it cannot be followed any more, says what becomes of it.
async fn conclude(
    client: &Client,
    output: &Output,
    signals: &mut Signals,
    id: JobId,
    ended: Result<Job, CliError>,
) -> Outcome {
    match ended {
        Ok(job) => {
            say_how_it_ended(output, &job);
            let code = job.own_exit_code();
            output.one_document(false, &[job])?;
            Ok(code)
        }
        Err(error @ CliError::Client(_)) => {
            eprintln!("mlad: job {id} is not followed any more, and goes on: `mlad wait {id}` waits for its end");
            Err(error)
        }
        // Nobody takes its output (`| head -1`): as a pipe would, that ends it.
        Err(error) => {
            tokio::select! {
                cancelled = cancel(client, id) => if let Err(error) = cancelled { explain(&error) },
                _ = signals.next() => {}
            }
            Err(error)
        }
    }
}

/// Asks the job to end; one that has is no fault.
async fn cancel(client: &Client, id: JobId) -> Result<(), CliError> {
    match follow::persist(&mut Patience::silent(), || client.cancel(id)).await {
        Ok(_) => Ok(()),
        Err(ClientError::Api(error)) if error.code == ErrorCode::Conflict => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The signals by which somebody ends this command.
struct Signals {
    interrupts: Signal,
    terminations: Signal,
}

impl Signals {
    fn listen() -> Result<Self, CliError> {
        let listen =
            |kind| signal(kind).map_err(|source| CliError::Io { doing: "listening for Ctrl-C".into(), source });
        Ok(Self { interrupts: listen(SignalKind::interrupt())?, terminations: listen(SignalKind::terminate())? })
    }

    /// The exit code of the next one: 128 and its number.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupts.recv() => 130,
            _ = self.terminations.recv() => 143,
        }
    }
}
