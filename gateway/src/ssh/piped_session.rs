//! A session without a terminal: the process has its pipes from us, the bytes go straight between pipe and
//! client, and the agent's connection carries control only.

use super::{
    agent::{self, bounded, kind_of},
    forward::Announcements,
    inbox::End,
    outlet::{Gone, Outlet},
    pump::{Output, pump_in, pump_out},
};
use mlad::channel::{Connection, ConnectionReader, ConnectionWriter, Exit, Frame};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use std::{io, os::fd::OwnedFd};
use tokio::net::unix::pipe::{Receiver, Sender};

/// Bytes a pipe holds (if the system's limit allows): fewer changes between us and the process.
const PIPE: usize = 256 * 1024;

/// Our ends of a process's pipes.
pub(super) struct Pipes {
    stdin: Sender,
    stdout: Receiver,
    stderr: Receiver,
}

impl Pipes {
    /// Makes pipes; the second part is for the process: standard input, output and error.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(super) fn new() -> io::Result<(Self, [OwnedFd; 3])> {
        let (stdin_read, stdin_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (stdout_read, stdout_write) = pipe_with(PipeFlags::CLOEXEC)?;
        let (stderr_read, stderr_write) = pipe_with(PipeFlags::CLOEXEC)?;
        for pipe in [&stdin_write, &stdout_read] {
            _ = fcntl_setpipe_size(pipe, PIPE);
        }
        let ours = Self {
            stdin: Sender::from_owned_fd(stdin_write)?,
            stdout: Receiver::from_owned_fd(stdout_read)?,
            stderr: Receiver::from_owned_fd(stderr_read)?,
        };
        Ok((ours, [stdin_read, stdout_write, stderr_write]))
    }
}

/// Serves the session until its process has ended and both its outputs are at their end, as sshd does; none
/// if the agent is lost before that.
pub(super) async fn serve(
    connection: Connection,
    pipes: Pipes,
    outlet: &Outlet,
    announcements: &Announcements,
) -> Result<Option<Exit>, Gone> {
    let Connection { mut reader, mut writer } = connection;
    let Pipes { stdin, stdout, stderr } = pipes;
    let inbox = outlet.inbox();
    let ending = async {
        let exit = read_exit(&mut reader, announcements);
        let outputs =
            async { tokio::try_join!(pump_out(stdout, outlet, Output::Data), pump_out(stderr, outlet, Output::Error)) };
        tokio::pin!(exit, outputs);
        // A lost agent ends the session, though its process may hold the pipes open.
        tokio::select! {
            exit = &mut exit => match exit {
                Some(exit) => outputs.await.map(|_| Some(exit)),
                None => Ok(None),
            },
            done = &mut outputs => match done {
                Ok(_) => Ok(exit.await),
                Err(gone) => Err(gone),
            },
        }
    };
    let end = tokio::select! {
        served = ending => return served,
        end = inbox.ended() => end,
        never = input_and_control(outlet, stdin, &mut writer) => match never {},
    };
    if end == End::Closed {
        agent::close(writer).await;
    }
    Err(Gone)
}

/// Feeds standard input, and passes signals on, for as long as the session lasts.
async fn input_and_control(outlet: &Outlet, stdin: Sender, writer: &mut ConnectionWriter) -> std::convert::Infallible {
    let inbox = outlet.inbox();
    let control = async {
        loop {
            let request = inbox.next_control().await.into();
            if writer.write(&Frame::Request(request)).await.is_err() {
                // The reader sees it, too.
                std::future::pending::<()>().await;
            }
        }
    };
    let input = async {
        pump_in(inbox, stdin).await;
        std::future::pending().await
    };
    tokio::join!(control, input).1
}

async fn read_exit(reader: &mut ConnectionReader, announcements: &Announcements) -> Option<Exit> {
    loop {
        match reader.read().await {
            Ok(Some(Frame::Exit(exit))) => return Some(bounded(exit)),
            Ok(Some(Frame::Incoming { ticket, .. })) => announcements.key_agent(ticket),
            Ok(Some(Frame::Eof | Frame::WindowAdjust { .. })) => {}
            Ok(Some(frame)) => {
                tracing::warn!(frame = kind_of(&frame), "an agent sent what does not belong into a session with pipes");
                return None;
            }
            Ok(None) => return None,
            Err(error) => {
                tracing::info!(%error, "an agent is lost");
                return None;
            }
        }
    }
}
