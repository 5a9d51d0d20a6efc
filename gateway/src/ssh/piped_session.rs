//! A session without a terminal: the process has its pipes from us, the bytes go straight between pipe and
//! client, and the agent's connection carries control only.

use super::{
    agent::{self, bounded, kind_of},
    forward::Announcements,
    inbox::End,
    outlet::{Gone, Outlet},
    pump::{FINISHING, Output, pump_in, pump_out, throw_away},
};
use futures::{FutureExt as _, future::FusedFuture as _};
use mlad::channel::{Connection, ConnectionReader, ConnectionWriter, Exit, Frame};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use std::{convert::Infallible, io, os::fd::OwnedFd, pin::pin};
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
/// if the agent is lost before that. If the channel is over before, input that has come to its end is still
/// delivered.
pub(super) async fn serve(
    connection: Connection,
    pipes: Pipes,
    outlet: &Outlet,
    announcements: &Announcements,
) -> Result<Option<Exit>, Gone> {
    let Connection { mut reader, mut writer } = connection;
    let Pipes { stdin, mut stdout, mut stderr } = pipes;
    let inbox = outlet.inbox();
    let mut input = pin!(pump_in(inbox, stdin).fuse());
    let mut exit = pin!(read_exit(&mut reader, announcements).fuse());
    let served = {
        let outputs = async {
            tokio::try_join!(pump_out(&mut stdout, outlet, Output::Data), pump_out(&mut stderr, outlet, Output::Error))
        };
        let ending = async {
            let mut outputs = pin!(outputs);
            // A lost agent ends the session, though its process may hold the pipes open.
            tokio::select! {
                exit = exit.as_mut() => match exit {
                    Some(exit) => outputs.await.map(|_| Some(exit)),
                    None => Ok(None),
                },
                done = &mut outputs => match done {
                    Ok(_) => Ok(exit.as_mut().await),
                    Err(gone) => Err(gone),
                },
            }
        };
        let inward = async { tokio::join!(control(outlet, &mut writer), input.as_mut()).0 };
        tokio::select! {
            served = ending => served,
            _ = inbox.ended() => Err(Gone),
            never = inward => match never {},
        }
    };
    if let Ok(exit) = served {
        return Ok(exit);
    }
    let end = inbox.ended().await;
    if inbox.is_whole() {
        let finishing = async {
            if !input.is_terminated() {
                input.await;
            }
            // A close would be SIGHUP to a process that is still at the end of it.
            if end == End::Closed && !exit.is_terminated() {
                exit.await;
            }
        };
        tokio::select! {
            _ = tokio::time::timeout(FINISHING, finishing) => {}
            never = throw_away(stdout, stderr) => match never {},
        }
    }
    if end == End::Closed {
        agent::close(writer).await;
    }
    Err(Gone)
}

/// Passes signals on, for as long as the session lasts.
async fn control(outlet: &Outlet, writer: &mut ConnectionWriter) -> Infallible {
    loop {
        let request = outlet.inbox().next_control().await.into();
        if writer.write(&Frame::Request(request)).await.is_err() {
            // The reader sees it, too.
            std::future::pending::<()>().await;
        }
    }
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
