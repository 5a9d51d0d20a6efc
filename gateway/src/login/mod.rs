//! From who somebody is to the workspace they mean: names, picker, progress while waiting, greeting.
//!
//! Without a terminal nothing is ever shown: scp, rsync, git and VS Code must see a clean stream. What is
//! shown is made by pure functions ([`menu`], [`progress`], [`greeting`], with every sentence in [`text`]);
//! whatever comes from users, images or the allocator is rid of what a terminal would obey.
//!
//! Not here: who somebody is ([`crate::ssh`]), and what a start does ([`crate::workspace`]).

mod console;
mod greeting;
mod keys;
mod menu;
mod name;
mod progress;
mod terminal;
#[cfg(test)]
mod tests;
mod text;
mod width;

pub use name::{DEFAULT_WORKSPACE, LoginError, LoginName, parse_login};
pub use terminal::enter_with_terminal;

use crate::{
    store::UserRecord,
    workspace::{Attached, Progress, Wish, WorkspaceError, Workspaces, later},
};
use async_trait::async_trait;
use mlad::{api::ExitCode, channel::PtySize};
use std::{io, time::Duration};

/// What a person's terminal sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Typed, or pasted.
    Bytes(Vec<u8>),
    /// Ctrl-C: behind what there was room for, or as a signal.
    Interrupt,
    /// Nothing more will be typed (`ssh -tt server < file`); the person may look on all the same. Comes once.
    End,
    /// The window has another size.
    Resize(PtySize),
}

/// A person's terminal: raw, as the client of a login with a pty has it.
#[async_trait]
pub trait Terminal: Send {
    /// Writes all of it.
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// The next input, of at most `room` bytes; what there is no room for stays where it is, and only a Ctrl-C
    /// in it is told. None when the person hung up. Cancel-safe.
    async fn read(&mut self, room: usize) -> io::Result<Option<Input>>;
    /// Its size now; zeros if it is not known.
    fn size(&self) -> PtySize;
    /// Its kind (`TERM`); may be empty.
    fn term(&self) -> &str;
    /// Whether a shell begins on it. A command (`ssh -t server top`) is not greeted, as sshd shows no message of the
    /// day before one: what it prints may be read by a program.
    fn begins_shell(&self) -> bool {
        true
    }
}

/// Where a login with a terminal has got to.
pub struct Entered {
    /// The workspace.
    pub attached: Attached,
    /// What was typed while it was waited for, for the shell: at most 4 KiB. More was left with the terminal.
    pub typed: Vec<u8>,
}

/// Why a login with a terminal ended before its workspace was there. The terminal has been told.
#[derive(Debug)]
pub enum LoginEnd {
    /// The person gave up (Ctrl-C).
    GaveUp,
    /// There was nobody to choose: the input came to its end first.
    NobodyChose,
    /// The person hung up, or the terminal failed.
    HungUp,
    /// There is no workspace to be had.
    Failed(WorkspaceError),
}

impl LoginEnd {
    /// The exit code of the session that ends with it.
    pub fn exit_code(&self) -> u32 {
        match self {
            Self::GaveUp => 130,
            Self::NobodyChose => ExitCode::Usage as u32,
            Self::HungUp => 255,
            Self::Failed(error) => exit_code(error),
        }
    }
}

/// The exit code of a session that ends because there is no workspace.
pub fn exit_code(error: &WorkspaceError) -> u32 {
    error.code().exit_code() as u32
}

/// An error and what to do about it in one line, for the standard error of a login without a terminal.
pub fn error_line(error: &WorkspaceError) -> String {
    text::error(error)
}

/// Brings a login without a terminal to its workspace, without a word, waiting for a slice for at most
/// `limit`; a container that is being made is not given up.
///
/// # Errors
/// Why there is none; [`error_line`] of it belongs on the standard error of the command.
pub async fn enter_silently(
    workspaces: &Workspaces,
    user: &UserRecord,
    wish: Wish,
    limit: Duration,
) -> Result<Attached, WorkspaceError> {
    let clock = workspaces.clock();
    let until = later(clock.now(), limit);
    let mut entering = workspaces.enter(user, wish).await?;
    let mut detail = text::STARTING.to_owned();
    let mut waits = true;
    loop {
        tokio::select! {
            biased;
            progress = entering.next() => {
                let progress = progress?;
                waits = !matches!(progress, Progress::Starting);
                match progress {
                    Progress::Ready(attached) => return Ok(attached),
                    Progress::Waiting(wait) => detail = text::wait_summary(&wait),
                    Progress::Stopping => detail = text::STOPPING.to_owned(),
                    Progress::Pulling { done, total } => detail = text::pulling(done, total),
                    Progress::Starting => detail = text::STARTING.to_owned(),
                }
            }
            () = clock.until(until), if waits => {
                return Err(WorkspaceError::Timeout { seconds: limit.as_secs(), detail });
            }
        }
    }
}
