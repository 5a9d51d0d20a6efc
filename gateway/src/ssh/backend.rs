//! What stands behind the front door, as a contract: workspaces, and workers for files and for `mlad`.
//!
//! The tests of this room put something else there.

use crate::{
    files::{TerminalProcess, WorkerProcess},
    login::Terminal,
    runtime::RuntimeError,
    store::UserRecord,
    workspace::{Notice, Wish},
};
use async_trait::async_trait;
use mlad::api::ExitCode;
use std::any::Any;
use tokio::{net::UnixStream, sync::watch};

/// What serves those who are let in. Whoever calls may have been let in long ago: that they still may is looked
/// at again.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Brings a user to the workspace they wish for; without a terminal without a word. Dropping the future
    /// gives the place in the queue back.
    async fn enter(
        &self,
        user: &UserRecord,
        wish: Wish,
        terminal: Option<&mut dyn Terminal>,
    ) -> Result<Entered, Refusal>;

    /// A user's workspace, if it runs; nothing is started for this, and nobody waits.
    async fn running(&self, user: &UserRecord, workspace: &str) -> Option<Box<dyn Place>>;

    /// Starts the worker of the sftp subsystem.
    async fn sftp(&self, user: &UserRecord) -> Result<Worker, Refusal>;

    /// Starts the worker for a command that is the far side of `scp`; none if `command` is another.
    async fn scp(&self, user: &UserRecord, command: &[u8]) -> Result<Option<Worker>, Refusal>;

    /// Runs `mlad` for the user, with no container; on a terminal if a size (columns, rows) is given.
    async fn mlad(
        &self,
        user: &UserRecord,
        arguments: &[String],
        environment: &[(String, String)],
        terminal: Option<(u16, u16)>,
    ) -> Result<Worker, Refusal>;
}

/// A workspace, and that somebody is in it; as long as one is left, it is not idle.
#[async_trait]
pub trait Place: Send + Sync {
    /// A new connection to its agent.
    async fn connect(&self) -> Result<UnixStream, RuntimeError>;
    /// Whether descriptors reach the agent over such a connection.
    fn passes_descriptors(&self) -> bool {
        true
    }
    /// What those in it should know, whenever that changes; what never has any says nothing.
    fn notices(&self) -> watch::Receiver<Notice> {
        watch::Sender::default().subscribe()
    }
    /// Returns, with the reason in words, when it is over.
    async fn ended(&self) -> String;
    /// The same for one more.
    fn another(&self) -> Box<dyn Place>;
}

/// Where a login has got to.
pub struct Entered {
    /// The workspace.
    pub place: Box<dyn Place>,
    /// What was typed while it was waited for.
    pub typed: Vec<u8>,
}

/// A process on this host that serves a channel.
pub struct Worker {
    /// The process.
    pub process: WorkerKind,
    /// What must live as long as it does.
    pub guard: Option<Box<dyn Any + Send>>,
}

/// How the bytes of a worker travel.
pub enum WorkerKind {
    /// By pipes.
    Pipes(WorkerProcess),
    /// By a terminal.
    Terminal(TerminalProcess),
}

/// Why a session cannot be, for the person who asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What happened and why, and what to do next: a line each. Empty if they were told already.
    pub lines: Vec<String>,
    /// The session's exit status.
    pub exit_status: u32,
}

impl Refusal {
    /// One line and an exit code.
    pub fn new(line: impl Into<String>, code: ExitCode) -> Self {
        Self { lines: vec![line.into()], exit_status: code as u32 }
    }
}
