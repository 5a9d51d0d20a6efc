//! The one command of a job's container: started at most once, its output straight to the log, its end written
//! down before the agent ends.

use super::{
    AgentError, Paths,
    launch::{Directory, JobFiles, Launch},
    memory::Kills,
    process::{Ending, Process},
    server::Shared,
};
use crate::channel::{Exit, JobResult, JobRun};
use rustix::process::Signal;
use std::{
    ffi::OsString,
    fs::File,
    io::{self, Write as _},
    path::Path,
    process::{ExitCode, Stdio},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// Runs the job to its end, or ends it when `stop` says so; returns what is written down as its result.
///
/// # Errors
/// When the result cannot be read or written.
pub(super) async fn run(
    job: &JobRun,
    paths: &Paths,
    shared: &Shared,
    stop: &CancellationToken,
) -> Result<Exit, AgentError> {
    if let Some(result) = earlier(paths)? {
        tracing::info!(?result, "the job's command has run already; it does not run again");
        return Ok(result.exit);
    }
    let failed = |path: &Path| AgentError::system(format!("cannot write {}", path.display()));
    write_durably(&paths.started, b"").map_err(failed(&paths.started))?;
    let result = match start(job, shared) {
        Ok(process) => attend(job, process, shared, stop).await,
        Err(error) => {
            tracing::error!(%error, "the job's command cannot be started");
            JobResult { exit: Exit::Status(126), out_of_memory: false }
        }
    };
    tracing::info!(?result, "the job's command has ended");
    save(&result, &paths.result).map_err(failed(&paths.result))?;
    copy(&result, paths);
    Ok(result.exit)
}

/// The exit code of an agent whose job ended so: as a shell would have it.
pub(super) fn exit_code(exit: &Exit) -> ExitCode {
    match exit {
        Exit::Status(status) => ExitCode::from(u8::try_from(*status).unwrap_or(1)),
        Exit::Signal { name, .. } => {
            let number = super::process::signal_of(name).map_or(0, Signal::as_raw);
            ExitCode::from(u8::try_from(128 + number).unwrap_or(1))
        }
    }
}

/// What an earlier run of this container left: a result, or the mark of a start that came to none.
fn earlier(paths: &Paths) -> Result<Option<JobResult>, AgentError> {
    let system = |source| AgentError::System { what: format!("cannot read {}", paths.result.display()), source };
    match std::fs::read(&paths.result) {
        Ok(text) => {
            return serde_json::from_slice(&text).map(Some).map_err(|error| system(io::Error::other(error)));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(system(error)),
    }
    if !paths.started.exists() {
        return Ok(None);
    }
    let message = "the container was stopped before the command had ended".to_owned();
    let exit = Exit::Signal { name: "KILL".into(), core_dumped: false, message };
    let result = JobResult { exit, out_of_memory: false };
    save(&result, &paths.result).map_err(system)?;
    Ok(Some(result))
}

fn start(job: &JobRun, shared: &Shared) -> io::Result<Process> {
    let Some(program) = job.command.first() else { return Err(io::Error::other("it is empty")) };
    let launch = Launch {
        terminal: false,
        directory: Directory::Exactly(job.working_directory.clone()),
        job: Some(JobFiles { log: job.log.clone(), artifacts: job.artifacts.clone() }),
        program: program.into(),
        arguments: job.command.iter().map(OsString::from).collect(),
    };
    let mut environment = shared.environment.clone();
    environment.insert("MLAD_ARTIFACTS".into(), job.artifacts.clone().into());
    let mut command = launch.command(&shared.user, environment.into_iter().collect());
    // The launcher puts the log in the place of both; until then its words go to the container's log.
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn()?;
    // Not with the sessions' ending: a job has a grace of its own.
    Process::guard(child, Signal::TERM, Ending::default(), &shared.tasks)
}

async fn attend(job: &JobRun, mut process: Process, shared: &Shared, stop: &CancellationToken) -> JobResult {
    let kills = Kills::now();
    let exit = tokio::select! {
        exit = process.exit() => exit,
        () = stop.cancelled() => terminate(&mut process, Duration::from_secs(job.grace_seconds)).await,
    };
    shared.kill_everything();
    let out_of_memory = kills.since();
    if let Some(message) = &out_of_memory {
        note(message, &job.log, shared).await;
    }
    JobResult { exit, out_of_memory: out_of_memory.is_some() }
}

async fn terminate(process: &mut Process, grace: Duration) -> Exit {
    tracing::info!(?grace, "ending the job's command");
    process.signal(Signal::TERM);
    if let Ok(exit) = tokio::time::timeout(grace, process.exit()).await {
        return exit;
    }
    process.signal(Signal::KILL);
    process.exit().await
}

/// Adds a line to the log, as the user; it is only for the user's information.
async fn note(message: &str, log: &Path, shared: &Shared) {
    let (path, line) = (log.to_owned(), format!("mlad: {message}\n"));
    let written = shared.rights.run(move || super::launch::open_log(&path)?.write_all(line.as_bytes()));
    if let Err(error) = written.await {
        tracing::warn!(%error, message, "cannot add a line to the job's log");
    }
}

/// For whoever runs the container and cannot look into it. Without it the result is lost, and the attempt with it.
fn copy(result: &JobResult, paths: &Paths) {
    let Some(path) = &paths.result_copy else { return };
    let written = serde_json::to_vec(result).map_err(io::Error::from).and_then(|bytes| std::fs::write(path, bytes));
    if let Err(error) = written {
        tracing::error!(%error, path = %path.display(), "the job's result cannot be passed on");
    }
}

fn save(result: &JobResult, path: &Path) -> io::Result<()> {
    write_durably(path, &serde_json::to_vec(result)?)
}

/// Writes a file so that it is there wholly or not at all, also after a crash of the machine. Its folder is the
/// gateway's: the user cannot get at it.
fn write_durably(path: &Path, contents: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(contents)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(folder: &Path) -> Paths {
        Paths { result: folder.join("result.json"), started: folder.join("started"), ..Paths::default() }
    }

    #[test]
    fn a_start_without_a_result_is_a_killed_command() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(folder.path());
        assert!(earlier(&paths).unwrap().is_none());
        write_durably(&paths.started, b"").unwrap();
        let result = earlier(&paths).unwrap().unwrap();
        assert!(matches!(&result.exit, Exit::Signal { name, .. } if name == "KILL"));
        assert_eq!(earlier(&paths).unwrap(), Some(result), "it is written down");
    }

    #[test]
    fn a_result_that_cannot_be_read_is_no_reason_to_run_again() {
        let folder = tempfile::tempdir().unwrap();
        let paths = paths(folder.path());
        std::fs::write(&paths.result, "{").unwrap();
        assert!(earlier(&paths).is_err());
    }

    #[test]
    fn exit_codes_are_a_shells() {
        let killed = Exit::Signal { name: "KILL".into(), core_dumped: false, message: String::new() };
        assert_eq!(format!("{:?}", exit_code(&killed)), format!("{:?}", ExitCode::from(137)));
        assert_eq!(format!("{:?}", exit_code(&Exit::Status(7))), format!("{:?}", ExitCode::from(7)));
    }
}
