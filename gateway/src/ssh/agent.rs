//! Talking to the agent in a container, which is hostile ground: everything is bounded and nothing believed.

use super::backend::{Place, Refusal};
use mlad::{
    api::ExitCode,
    channel::{Connection, ConnectionWriter, Exit, Frame, Open, Request},
};
use std::{
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    time::Duration,
};

/// Time an agent has to open a session or a listener, and to answer a session's requests.
pub(super) const PROMPTLY: Duration = Duration::from_secs(10);
/// Time an agent has to reach a target; it gives up by itself after 30 seconds.
pub(super) const REACHING: Duration = Duration::from_secs(35);
/// Time an agent has to take a close.
const CLOSING: Duration = Duration::from_secs(1);
/// Longest text taken from an agent for a person, in characters.
const MAX_TEXT: usize = 512;
/// Longest name of a signal, in characters.
const MAX_SIGNAL: usize = 32;

/// Why the agent did not open something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refused {
    /// As in RFC 4254 section 5.1.
    pub(super) reason: u32,
    /// For a person.
    pub(super) message: String,
}

impl Refused {
    fn new(message: impl Into<String>) -> Self {
        Self { reason: 2, message: message.into() }
    }
}

/// A new connection to the agent, opened for `open`, and the port of a listener.
pub(super) async fn dial(place: &dyn Place, open: Open, limit: Duration) -> Result<(Connection, u32), Refused> {
    let dialled = async {
        let stream = place.connect().await.map_err(|error| Refused::new(error.to_string()))?;
        let mut connection = Connection::new(stream, false);
        let sent = connection.writer.write(&Frame::Open(open)).await;
        sent.map_err(|error| Refused::new(format!("the workspace's agent cannot be reached: {error}")))?;
        match connection.reader.read().await {
            Ok(Some(Frame::Opened { port })) => Ok((connection, port)),
            Ok(Some(Frame::OpenFailure { reason, message })) => Err(Refused { reason, message: clean(&message) }),
            Ok(_) => Err(Refused::new("the workspace's agent gave no proper answer")),
            Err(error) => Err(Refused::new(format!("the workspace's agent gave no proper answer: {error}"))),
        }
    };
    tokio::time::timeout(limit, dialled)
        .await
        .unwrap_or_else(|_| Err(Refused::new(format!("no answer from the workspace within {} s", limit.as_secs()))))
}

/// Asks for everything in `requests`, of which the last starts the process and takes the descriptors along.
pub(super) async fn start(
    connection: &mut Connection,
    requests: &[Request],
    descriptors: &[OwnedFd],
) -> Result<(), Refusal> {
    let Some((last, before)) = requests.split_last() else { return Ok(()) };
    let started = async {
        for request in before {
            connection.writer.write(&Frame::Request(request.clone())).await.map_err(lost)?;
        }
        for request in before {
            read_answer(connection, request).await?;
        }
        // Alone on the way, so that its descriptors cannot be taken for those of a request before it.
        let beside: Vec<BorrowedFd<'_>> = descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
        let frame = Frame::Request(last.clone());
        connection.writer.write_with_descriptors(&frame, &beside).await.map_err(lost)?;
        read_answer(connection, last).await
    };
    tokio::time::timeout(PROMPTLY, started).await.unwrap_or_else(|_| {
        Err(Refusal::new("the workspace's agent does not answer; log in again", ExitCode::TryLater))
    })
}

async fn read_answer(connection: &mut Connection, request: &Request) -> Result<(), Refusal> {
    match connection.reader.read().await.map_err(lost)? {
        Some(Frame::Success) => Ok(()),
        Some(Frame::Failure { message }) => match request {
            // As with sshd: a session goes on without these, and is told.
            Request::Env { name, .. } => {
                tracing::debug!(name, reason = clean(&message), "the agent refused a variable");
                Ok(())
            }
            Request::AgentForwarding => {
                tracing::info!(reason = clean(&message), "no agent forwarding");
                Ok(())
            }
            _ => Err(Refusal::new(clean(&message), ExitCode::Failure)),
        },
        Some(frame) => Err(lost(format!("an unexpected frame {}", kind_of(&frame)))),
        None => Err(lost("it closed the connection")),
    }
}

/// Tells the agent that the user has closed the session.
pub(super) async fn close(mut writer: ConnectionWriter) {
    _ = tokio::time::timeout(CLOSING, writer.write(&Frame::Close)).await;
}

/// How a process ended, with bounds on what the agent says about it.
pub(super) fn bounded(exit: Exit) -> Exit {
    match exit {
        Exit::Status(status) => Exit::Status(status),
        Exit::Signal { name, core_dumped, message } => Exit::Signal {
            name: name.chars().filter(char::is_ascii_alphanumeric).take(MAX_SIGNAL).collect(),
            core_dumped,
            message: clean(&message),
        },
    }
}

/// Text from the container, for a person's terminal.
pub(super) fn clean(text: &str) -> String {
    text.chars().filter(|symbol| !symbol.is_control()).take(MAX_TEXT).collect()
}

fn lost(reason: impl std::fmt::Display) -> Refusal {
    Refusal::new(format!("the workspace's agent is lost: {reason}; log in again"), ExitCode::TryLater)
}

/// The name of a frame, for the log: what is in it comes from outside.
pub(super) fn kind_of(frame: &Frame) -> &'static str {
    match frame {
        Frame::Open(_) => "open",
        Frame::Opened { .. } => "opened",
        Frame::OpenFailure { .. } => "open failure",
        Frame::Request(_) => "request",
        Frame::Success => "success",
        Frame::Failure { .. } => "failure",
        Frame::Data(_) => "data",
        Frame::ExtendedData(_) => "extended data",
        Frame::Eof => "end of file",
        Frame::Exit(_) => "exit",
        Frame::Close => "close",
        Frame::Incoming { .. } => "incoming",
        Frame::WindowAdjust { .. } => "window adjust",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_a_container_cannot_play_with_the_terminal() {
        assert_eq!(clean("\x1b[2Jgone\r\n"), "[2Jgone");
        assert_eq!(clean(&"x".repeat(100_000)).len(), MAX_TEXT);
        let exit = Exit::Signal { name: "K\x1bILL".into(), core_dumped: true, message: "\x07".into() };
        assert_eq!(bounded(exit), Exit::Signal { name: "KILL".into(), core_dumped: true, message: String::new() });
    }
}
