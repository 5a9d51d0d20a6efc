//! The agent: process 1 of every container, which does there what an sshd would do, for one user.
//!
//! It speaks [`crate::channel`]'s protocol (`docs/agent-protocol.md`) with the gateway, which alone can
//! reach it. Not here: SSH, the network between gateway and container, who the user is.
//!
//! Three processes of the same binary, so that each is simple:
//! * [`init`] — process 1: starts the agent proper, reaps orphans, passes SIGTERM on, ends with it.
//! * [`server`] — the agent proper: [`session`]s, [`forward`]ing, the [`api_socket`], and the [`job`]'s command.
//! * [`launch`] — the first step of every process of the user, already with the user's ids: a session of its
//!   own, the controlling terminal, the working folder; then it becomes the program.
//!
//! What is done *for* the user in the file system is done with the user's [`rights`].

mod account;
mod api_socket;
mod forward;
mod incoming;
mod init;
mod install;
mod job;
mod launch;
mod memory;
mod network;
mod process;
mod resolve;
mod rights;
mod server;
mod session;
mod splice;
mod terminal;
mod ticket;
mod unix;

use crate::channel::{AGENT_CONFIG, AGENT_RESULT, AGENT_SOCKET, API_SOCKET};
use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

/// What can keep an agent from its work; a person meets it in the container's log.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// An argument of `mlad agent` is unknown.
    #[error("mlad agent: {0:?} is no argument of it; it is started by MLAD as process 1 of a container")]
    Argument(OsString),
    /// The configuration is missing or wrong.
    #[error("cannot read {path}: {reason}; the gateway writes it before it starts a container", path = path.display())]
    Config {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Something of the system failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The error.
        source: io::Error,
    },
}

impl AgentError {
    fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}

/// Where the agent finds and makes its files; elsewhere than in a container only for tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The socket the gateway dials.
    pub agent_socket: PathBuf,
    /// [`crate::channel::AgentConfig`] as JSON.
    pub config: PathBuf,
    /// [`crate::channel::JobResult`] of the job's command as JSON.
    pub result: PathBuf,
    /// Mark that the job's command was started.
    pub started: PathBuf,
    /// A second place for the result, which whoever runs the container reads; written at its end, not durably.
    pub result_copy: Option<PathBuf>,
    /// The socket of the HTTP API.
    pub api_socket: PathBuf,
    /// Folder of `passwd`, `group` and `profile.d`.
    pub etc: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            agent_socket: AGENT_SOCKET.into(),
            config: AGENT_CONFIG.into(),
            result: AGENT_RESULT.into(),
            started: Path::new(AGENT_CONFIG).with_file_name("started"),
            result_copy: None,
            api_socket: API_SOCKET.into(),
            etc: "/etc".into(),
        }
    }
}

impl Paths {
    /// The paths after `--folder DIR` (all that is in `/run/mlad` elsewhere), `--config FILE`, `--result-copy FILE` and
    /// `--etc DIR`.
    fn from_arguments(mut arguments: impl Iterator<Item = OsString>) -> Result<Self, AgentError> {
        let mut paths = Self::default();
        while let Some(argument) = arguments.next() {
            match (argument.to_str(), arguments.next().map(PathBuf::from)) {
                (Some("--folder"), Some(run)) => {
                    paths.agent_socket = run.join("agent/agent.sock");
                    paths.config = run.join("agent/config.json");
                    paths.result = run.join("agent/result.json");
                    paths.started = run.join("agent/started");
                    paths.api_socket = run.join("api.sock");
                }
                (Some("--config"), Some(config)) => paths.config = config,
                (Some("--result-copy"), Some(copy)) => paths.result_copy = Some(copy),
                (Some("--etc"), Some(etc)) => paths.etc = etc,
                _ => return Err(AgentError::Argument(argument)),
            }
        }
        Ok(paths)
    }
}

/// What the agent admits at once, and how long it waits. Written down in `docs/agent-protocol.md`.
mod limits {
    use super::Duration;

    /// Connections of the gateway.
    pub(super) const CONNECTIONS: usize = 1024;
    /// Sessions.
    pub(super) const SESSIONS: usize = 256;
    /// Variables a session may set.
    pub(super) const VARIABLES: usize = 256;
    /// Bytes of those variables together.
    pub(super) const VARIABLE_BYTES: usize = 128 * 1024;
    /// Listeners of forwarding.
    pub(super) const LISTENERS: usize = 64;
    /// Announced and not yet taken, of each listener.
    pub(super) const PENDING: usize = 32;
    /// How long a ticket is good.
    pub(super) const TICKET_TIME: Duration = Duration::from_secs(30);
    /// For one address or socket to answer.
    pub(super) const CONNECT_TIME: Duration = Duration::from_secs(10);
    /// For all addresses of a name, the name server included.
    pub(super) const CONNECT_ALL_TIME: Duration = Duration::from_secs(30);
    /// For the target to take what the gateway sent before it closed.
    pub(super) const LINGER: Duration = Duration::from_secs(60);
    /// Connections to the API socket.
    pub(super) const API_CONNECTIONS: usize = 256;
    /// Those of them that wait for a gateway.
    pub(super) const API_WAITING: usize = 64;
    /// How long they wait.
    pub(super) const API_TIME: Duration = Duration::from_secs(20);
    /// Threads that work with the user's rights.
    pub(super) const RIGHTS_THREADS: usize = 32;
    /// From the gateway's connect to its first frame.
    pub(super) const OPEN_TIME: Duration = Duration::from_secs(10);
    /// What killed processes, and then the gateway's connections, have to be gone before the agent ends anyway.
    pub(super) const FAREWELL: Duration = Duration::from_secs(1);
    /// What sessions have between SIGHUP and SIGKILL when the container is told to end; below the 10
    /// seconds that container engines give.
    pub(super) const GRACE: Duration = Duration::from_secs(5);
}

/// Runs `mlad agent` with what follows these two words, and returns the process's exit code. Must be called
/// before any thread is started: the launcher relies on being alone.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let mut arguments = arguments.peekable();
    let result = match arguments.peek().and_then(|first| first.to_str()) {
        Some("launch") => return launch::run(arguments.skip(1)),
        Some("serve") => serve(arguments.skip(1)),
        Some("install") => install::copy(arguments.skip(1)),
        Some("accounts") => install::accounts(arguments.skip(1)),
        _ => {
            let arguments: Vec<OsString> = arguments.collect();
            Paths::from_arguments(arguments.iter().cloned()).and_then(|_| init::run(&arguments))
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("mlad agent: {error}");
        ExitCode::FAILURE
    })
}

fn serve(arguments: impl Iterator<Item = OsString>) -> Result<ExitCode, AgentError> {
    let mut arguments = arguments.peekable();
    let in_container = arguments.next_if(|first| first == init::IN_CONTAINER).is_some();
    let paths = Paths::from_arguments(arguments)?;
    server::run(&paths, in_container)
}
