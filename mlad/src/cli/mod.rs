//! The commands a person types: what there is to say on the command line, and which room does it.
//!
//! Tables go to standard output, words about progress to standard error and only on a terminal; with `--json`
//! the API's own JSON goes out. Exit codes are those of [`ExitCode`]; `run` and `wait` give the job's own.

mod admin;
mod artifacts;
mod authorities;
mod completion;
mod doctor;
mod expiry;
mod follow;
mod forwarding;
mod gpus;
mod history;
mod jobs;
mod nodes;
mod output;
mod own;
mod projects;
mod reservations;
mod run;

use crate::{
    api::{ApiError, ErrorCode, ExitCode, JobId, Need},
    client::{Client, ClientError, Endpoint},
};
use clap::{Args, CommandFactory as _, Parser, Subcommand, error::ErrorKind};
use clap_complete::ArgValueCandidates;
use output::Output;
use std::path::PathBuf;

/// Jobs, slices and workspaces of MLAD.
///
/// Inside a container it finds the gateway by itself; from elsewhere use `ssh mlad@SERVER mlad …`.
#[derive(Debug, Parser)]
#[command(name = "mlad", version, max_term_width = 100, infer_long_args = true)]
pub struct Cli {
    /// Where the gateway's API is: unix:/PATH or http://ADDRESS:PORT [default: found by itself].
    #[arg(long, global = true, env = "MLAD_API", value_name = "URL", hide_env_values = true)]
    api: Option<Endpoint>,
    /// File with the bearer token for an API on TCP.
    #[arg(long, global = true, env = "MLAD_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Print one JSON document instead of tables and sentences.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command as a job, follow its output, and end with its exit code; with --json print the job when it
    /// has ended, and not its output.
    Run(jobs::SubmitArguments),
    /// Hand in a command as a job and print its number.
    Submit(jobs::SubmitArguments),
    /// List jobs: those that have not ended, or all.
    Ps(jobs::PsArguments),
    /// Print a job's output.
    Logs(jobs::LogsArguments),
    /// Wait until jobs have ended; the exit code is that of the last one.
    Wait(Ids),
    /// Ask jobs to end.
    Cancel(Ids),
    /// Keep queued jobs from starting.
    Hold(Ids),
    /// Let held jobs start.
    Release(Ids),
    /// Fetch what a job left in its artifacts folder.
    Get(artifacts::GetArguments),
    /// Who holds which slice, and who waits; or who held which.
    Who {
        /// At this time: 2026-11-27T14:00:00Z, "2026-11-27 14:00", or 2h for two hours ago.
        #[arg(long, value_name = "TIME", value_parser = history::at_parser(), allow_hyphen_values = true)]
        at: Option<jiff::Timestamp>,
    },
    /// What was used: hours of slices and of whole GPUs.
    Acct(history::AcctArguments),
    /// The map of the GPUs.
    Gpu,
    /// What a job or workspace waits for.
    Why {
        /// A job's number or a workspace's name [default: everything of yours that waits].
        #[arg(add = ArgValueCandidates::new(completion::job_ids))]
        what: Option<String>,
    },
    /// Images that workloads can be made of.
    #[command(subcommand)]
    Image(ImageCommand),
    /// What you may hold at once, and hold.
    Quota,
    /// Who the gateway takes you for.
    Whoami,
    /// Your workspaces.
    #[command(subcommand)]
    Workspace(own::WorkspaceCommand),
    /// Your projects.
    #[command(subcommand)]
    Project(projects::ProjectCommand),
    /// List the reservations that you may use (`mlad run --reservation NAME`).
    Reservations,
    /// Your SSH keys.
    #[command(subcommand)]
    Key(own::KeyCommand),
    /// Your tokens for the API on TCP.
    #[command(subcommand)]
    Token(own::TokenCommand),
    /// Print the lines that make your shell complete commands and live names.
    Completion {
        /// bash, zsh or fish.
        shell: completion::Shell,
    },
    /// Look for what is missing or broken, and say what mends it.
    Doctor,
    /// Administration: on the server, as root.
    #[command(subcommand)]
    Admin(admin::AdminCommand),
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// List the catalog.
    Ls,
}

/// Numbers of jobs.
#[derive(Debug, Args)]
struct Ids {
    /// Numbers of jobs.
    #[arg(required = true, value_name = "ID", add = ArgValueCandidates::new(completion::job_ids))]
    ids: Vec<JobId>,
}

/// Why a command ends without success.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{doing}: {source}")]
    Io {
        /// What was being done, to what.
        doing: String,
        source: std::io::Error,
    },
    /// Whoever read our output has stopped: not worth a word.
    #[error("the output is closed")]
    OutputClosed,
}

impl From<ApiError> for CliError {
    fn from(error: ApiError) -> Self {
        Self::Client(error.into())
    }
}

impl CliError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Client(error) => error.exit_code(),
            Self::Io { .. } | Self::OutputClosed => ExitCode::Failure,
        }
    }
}

/// What a command ends with: a job's own exit code, or [`ExitCode::Success`].
type Outcome = Result<u8, CliError>;

const DONE: Outcome = Ok(ExitCode::Success as u8);

/// Runs the command line of this process to its end.
pub fn main() -> std::process::ExitCode {
    clap_complete::CompleteEnv::with_factory(Cli::command).complete();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let wanted = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            drop(error.print());
            return if wanted { ExitCode::Success.into() } else { ExitCode::Usage.into() };
        }
    };
    let Cli { api, token_file, json, command } = cli;
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return end(&CliError::Io { doing: "starting".into(), source: error }),
    };
    match runtime.block_on(dispatch(api, token_file, Output::new(json), command)) {
        Ok(code) => code.into(),
        Err(error) => end(&error),
    }
}

/// Ends with what went wrong.
fn end(error: &CliError) -> std::process::ExitCode {
    explain(error);
    error.exit_code().into()
}

/// Says what went wrong and what to do next.
fn explain(error: &CliError) {
    if matches!(error, CliError::OutputClosed) {
        return;
    }
    eprintln!("mlad: {error}");
    if let CliError::Client(error) = error
        && let Some(hint) = error.hint()
    {
        eprintln!("      {hint}");
    }
}

async fn dispatch(api: Option<Endpoint>, token_file: Option<PathBuf>, output: Output, command: Command) -> Outcome {
    if let Command::Completion { shell } = command {
        return completion::print(shell);
    }
    if matches!(command, Command::Doctor) {
        return doctor::run(api, token_file.as_deref(), &output).await;
    }
    let mut client = match api {
        Some(endpoint) => Client::new(endpoint),
        None => Client::new(Endpoint::from_environment().map_err(ClientError::from)?),
    };
    if let Some(path) = token_file {
        client = client.with_token_file(&path)?;
    }
    let client = &client;
    match command {
        Command::Run(arguments) => run::run(client, &output, arguments).await,
        Command::Submit(arguments) => jobs::submit(client, &output, arguments).await,
        Command::Ps(arguments) => jobs::ps(client, &output, arguments).await,
        Command::Logs(arguments) => jobs::logs(client, arguments).await,
        Command::Wait(ids) => jobs::wait(client, &output, &ids.ids).await,
        Command::Cancel(ids) => jobs::cancel(client, &output, &ids.ids).await,
        Command::Hold(ids) => jobs::hold(client, &output, &ids.ids).await,
        Command::Release(ids) => jobs::release(client, &output, &ids.ids).await,
        Command::Get(arguments) => artifacts::get(client, &output, arguments).await,
        Command::Who { at: None } => gpus::who(client, &output).await,
        Command::Who { at: Some(at) } => history::who_at(client, &output, at).await,
        Command::Acct(arguments) => history::acct(client, &output, arguments).await,
        Command::Gpu => gpus::map(client, &output).await,
        Command::Why { what } => gpus::why(client, &output, what.as_deref()).await,
        Command::Image(ImageCommand::Ls) => gpus::images(client, &output).await,
        Command::Quota => gpus::quota(client, &output).await,
        Command::Whoami => own::whoami(client, &output).await,
        Command::Workspace(command) => own::workspace(client, &output, command).await,
        Command::Project(command) => projects::run(client, &output, command).await,
        Command::Reservations => reservations::mine(client, &output).await,
        Command::Key(command) => own::key(client, &output, command).await,
        Command::Token(command) => own::token(client, &output, command).await,
        Command::Admin(command) => admin::run(client, &output, command).await,
        Command::Completion { .. } | Command::Doctor => DONE,
    }
}

/// A need on the command line; the message names the forms.
fn parse_need(text: &str) -> Result<Need, String> {
    text.parse::<Need>().map_err(|error| error.to_string())
}

fn bad_request(message: impl Into<String>) -> CliError {
    ApiError::new(ErrorCode::BadRequest, message).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_after_two_dashes_is_the_command() {
        let cli =
            Cli::try_parse_from(["mlad", "run", "--gpu", "2g.10gb", "--", "sh", "-c", "exit 7", "--json"]).unwrap();
        assert!(!cli.json);
        let Command::Run(arguments) = cli.command else { panic!("not run") };
        assert_eq!(arguments.command, ["sh", "-c", "exit 7", "--json"]);
        assert_eq!(arguments.gpu, Some(Need::Profile("2g.10gb".into())));
    }
}
