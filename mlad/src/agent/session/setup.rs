//! What comes before a session's process: the terminal and the variables it asks for, and the start.

use super::Terminal;
use crate::{
    agent::{
        account::account_variables,
        launch::{Directory, Launch},
        limits,
        process::Process,
        server::Shared,
        unix::UserListener,
    },
    channel::{Connection, Frame, MAX_DESCRIPTORS, Request},
};
use bytes::Bytes;
use rustix::process::Signal;
use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::OwnedFd,
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::{Path, PathBuf},
    process::Stdio,
};
use tokio::process::{ChildStderr, ChildStdin, ChildStdout};

/// Where an image may have subsystems of its own.
const SUBSYSTEMS: &str = "/usr/lib/mlad/subsystems";

/// A session whose process runs.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) process: Process,
    pub(super) wiring: Wiring,
    /// Where the client's key agent is reached.
    pub(super) key_agent: Option<UserListener>,
}

/// How a process is wired to the gateway.
#[derive(Debug)]
pub(super) enum Wiring {
    /// By a terminal.
    Terminal(Terminal),
    /// By the gateway's own descriptors.
    Descriptors,
    /// By pipes, the bytes in frames.
    Pipes(ChildStdin, ChildStdout, ChildStderr),
}

/// Answers requests until one has started a process; `None` when there will be none.
///
/// # Errors
/// When the connection fails.
pub(super) async fn negotiate(connection: &mut Connection, shared: &Shared) -> io::Result<Option<Started>> {
    let mut setup = Setup::default();
    let started = setup.negotiate(connection, shared).await;
    if let Some((unused, _)) = setup.key_agent.take() {
        unused.remove(&shared.rights).await;
    }
    started
}

#[derive(Debug, Default)]
struct Setup {
    terminal: Option<(Terminal, OwnedFd)>,
    term: OsString,
    variables: BTreeMap<OsString, OsString>,
    key_agent: Option<(UserListener, PathBuf)>,
}

/// What the process is.
enum Program {
    LoginShell,
    Command(OsString),
}

impl Setup {
    async fn negotiate(&mut self, connection: &mut Connection, shared: &Shared) -> io::Result<Option<Started>> {
        loop {
            let frame = tokio::select! {
                frame = connection.reader.read() => frame?,
                () = shared.ending.hang_up.cancelled() => return Ok(None),
            };
            let Some(Frame::Request(request)) = frame else { return Ok(None) };
            let answered = request.is_answered();
            // Those of the request that starts the process may have come together with an earlier one.
            let starts = matches!(request, Request::Shell | Request::Exec { .. } | Request::Subsystem { .. });
            let descriptors = if starts { connection.reader.take_descriptors() } else { Vec::new() };
            let (answer, started) = match self.handle(request, descriptors, shared).await {
                Ok(started) => (Frame::Success, started),
                Err(message) => (Frame::Failure { message }, None),
            };
            if answered {
                connection.writer.write(&answer).await?;
            }
            if started.is_some() {
                return Ok(started);
            }
        }
    }

    async fn handle(
        &mut self,
        request: Request,
        descriptors: Vec<OwnedFd>,
        shared: &Shared,
    ) -> Result<Option<Started>, String> {
        let program = match request {
            Request::Shell => Program::LoginShell,
            Request::Exec { command } => Program::Command(OsString::from_vec(command.to_vec())),
            Request::Subsystem { name } => Program::Command(subsystem(&name)?),
            Request::Pty { term, size, modes } => {
                if self.terminal.is_some() {
                    return Err("the session has a terminal already".into());
                }
                let terminal = Terminal::open(&shared.user, size, modes)
                    .map_err(|error| format!("cannot make a terminal: {error}"))?;
                self.terminal = Some(terminal);
                self.term = term.into();
                return Ok(None);
            }
            Request::Env { name, value } => return self.set_variable(name, &value).map(|()| None),
            Request::WindowChange(size) => {
                if let Some((terminal, _)) = &self.terminal {
                    let _ = terminal.resize(size);
                }
                return Ok(None);
            }
            Request::Signal { .. } => return Ok(None),
            Request::AgentForwarding => {
                if self.key_agent.is_none() {
                    let bound = UserListener::bind_in_new_folder(&shared.rights).await;
                    self.key_agent =
                        Some(bound.map_err(|error| format!("cannot make a socket for the key agent: {error}"))?);
                }
                return Ok(None);
            }
        };
        self.start(program, descriptors, shared).map(Some)
    }

    fn set_variable(&mut self, name: String, value: &Bytes) -> Result<(), String> {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains(&0) {
            return Err(format!("{name:?} cannot be a variable"));
        }
        let size: usize = self.variables.iter().map(|(name, value)| name.len() + value.len()).sum();
        if self.variables.len() >= limits::VARIABLES || size + name.len() + value.len() > limits::VARIABLE_BYTES {
            return Err("too many variables".into());
        }
        self.variables.insert(name.into(), OsStr::from_bytes(value).to_owned());
        Ok(())
    }

    fn start(&mut self, program: Program, descriptors: Vec<OwnedFd>, shared: &Shared) -> Result<Started, String> {
        let cannot = |error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock => "cannot start: the container has as many processes as it may".to_owned(),
            _ => format!("cannot start: {error}"),
        };
        let mut command = self.launch(program, shared).command(&shared.user, self.environment(shared));
        let stdio = self.stdio(descriptors)?;
        let piped = stdio.is_none() && self.terminal.is_none();
        let [stdin, stdout, stderr] = stdio.unwrap_or_else(|| [Stdio::piped(), Stdio::piped(), Stdio::piped()]);
        let mut child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn().map_err(cannot)?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        // A shell on a terminal ignores SIGTERM; a command may have something to do on it.
        let farewell = if self.terminal.is_some() { Signal::HUP } else { Signal::TERM };
        let process = Process::guard(child, farewell, shared.ending.clone(), &shared.tasks).map_err(cannot)?;
        let wiring = match (self.terminal.take(), pipes) {
            (Some((terminal, _)), _) => Wiring::Terminal(terminal),
            (None, (Some(stdin), Some(stdout), Some(stderr))) if piped => Wiring::Pipes(stdin, stdout, stderr),
            _ => Wiring::Descriptors,
        };
        Ok(Started { process, wiring, key_agent: self.key_agent.take().map(|(listener, _)| listener) })
    }

    /// What becomes the process's standard input, output and error; none for pipes of ours.
    fn stdio(&self, descriptors: Vec<OwnedFd>) -> Result<Option<[Stdio; 3]>, String> {
        if let Some((_, slave)) = &self.terminal {
            let copy =
                || slave.try_clone().map(Stdio::from).map_err(|error| format!("cannot use the terminal: {error}"));
            return Ok(Some([copy()?, copy()?, copy()?]));
        }
        if descriptors.is_empty() {
            return Ok(None);
        }
        let descriptors: [OwnedFd; MAX_DESCRIPTORS] = descriptors
            .try_into()
            .map_err(|wrong: Vec<_>| format!("{} descriptors came where 3 or none are taken", wrong.len()))?;
        Ok(Some(descriptors.map(Stdio::from)))
    }

    fn launch(&self, program: Program, shared: &Shared) -> Launch {
        let shell = &shared.user.shell;
        let name = shell.file_name().unwrap_or(OsStr::new("sh"));
        let arguments = match program {
            Program::LoginShell => {
                let mut login = OsString::from("-");
                login.push(name);
                vec![login]
            }
            Program::Command(command) => vec![name.to_owned(), "-c".into(), command],
        };
        Launch {
            terminal: self.terminal.is_some(),
            directory: Directory::Home(shared.user.home.clone()),
            job: None,
            program: shell.clone().into(),
            arguments,
        }
    }

    fn environment(&self, shared: &Shared) -> Vec<(OsString, OsString)> {
        let mut environment = shared.environment.clone();
        environment.extend(self.variables.clone());
        environment.extend(account_variables(&shared.user));
        if let Some((terminal, _)) = &self.terminal {
            environment.insert("SSH_TTY".into(), terminal.name().clone());
            if !self.term.is_empty() {
                environment.insert("TERM".into(), self.term.clone());
            }
        }
        if let Some((_, path)) = &self.key_agent {
            environment.insert("SSH_AUTH_SOCK".into(), path.into());
        }
        environment.into_iter().collect()
    }
}

fn subsystem(name: &str) -> Result<OsString, String> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    let path = Path::new(SUBSYSTEMS).join(name);
    if name.is_empty() || name.starts_with('.') || !name.bytes().all(good) || !path.is_file() {
        return Err(format!("the image has no subsystem {name:?}: there is no {}", path.display()));
    }
    Ok(path.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subsystem_is_a_file_of_its_folder_only() {
        for name in ["", "..", "../../../bin/sh", "a b", "sftp"] {
            assert!(subsystem(name).is_err(), "{name}");
        }
    }

    #[test]
    fn variables_are_checked_and_bounded() {
        let mut setup = Setup::default();
        assert!(setup.set_variable("LANG".into(), &Bytes::from_static(b"C")).is_ok());
        for (name, value) in [("", &b"x"[..]), ("a=b", b"x"), ("a\0", b"x"), ("a", b"x\0")] {
            assert!(setup.set_variable(name.into(), &Bytes::copy_from_slice(value)).is_err());
        }
        assert!(setup.set_variable("big".into(), &Bytes::from(vec![b'x'; limits::VARIABLE_BYTES])).is_err());
        while setup.set_variable(format!("v{}", setup.variables.len()), &Bytes::new()).is_ok() {}
        assert_eq!(setup.variables.len(), limits::VARIABLES);
    }
}
