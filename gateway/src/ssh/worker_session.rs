//! A session served by a worker on this host: sftp, scp, `mlad`.

use super::{
    backend::{Worker, WorkerKind},
    inbox::{Control, Inbox},
    outlet::{Gone, Outlet},
    pump::{FINISHING, Output, pump_in, pump_out, throw_away},
};
use crate::files::{TerminalProcess, WorkerProcess};
use mlad::channel::{Exit, PtySize};
use rustix::{
    process::{Pid, Signal, kill_process},
    termios::{Winsize, tcsetwinsize},
};
use std::{
    convert::Infallible,
    io,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::process::ExitStatusExt as _,
    },
    pin::Pin,
    process::ExitStatus,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd},
    process::Child,
};

/// Serves the session until the worker has ended.
pub(super) async fn serve(worker: Worker, outlet: &Outlet) -> Result<Exit, Gone> {
    let Worker { process, guard } = worker;
    let served = match process {
        WorkerKind::Pipes(process) => serve_pipes(process, outlet).await,
        WorkerKind::Terminal(process) => serve_terminal(process, outlet).await,
    };
    drop(guard);
    served
}

async fn serve_pipes(process: WorkerProcess, outlet: &Outlet) -> Result<Exit, Gone> {
    let WorkerProcess { stdin, mut stdout, mut stderr, mut child } = process;
    let pid = pid_of(&child);
    let inbox = outlet.inbox();
    let mut input = Box::pin(feed(inbox, stdin));
    let served = {
        let running = async {
            let outputs = async {
                tokio::try_join!(
                    pump_out(&mut stdout, outlet, Output::Data),
                    pump_out(&mut stderr, outlet, Output::Error)
                )
            };
            outputs.await?;
            Ok(exit_of(child.wait().await))
        };
        tokio::select! {
            exit = running => exit,
            _ = inbox.ended() => Err(Gone),
            never = async { tokio::join!(input.as_mut(), control(inbox, pid, None)).1 } => match never {},
        }
    };
    if served.is_ok() {
        return served;
    }
    // What it was sent before it still writes: all of it, if that has come to its end.
    inbox.ended().await;
    let rest = inbox.is_whole().then_some(input);
    let finishing = async {
        tokio::select! {
            _ = child.wait() => {}
            () = async { match rest { Some(input) => match input.await {}, None => std::future::pending().await } } => {}
            never = throw_away(stdout, stderr) => match never {},
        }
    };
    _ = tokio::time::timeout(FINISHING, finishing).await;
    Err(Gone)
}

async fn serve_terminal(process: TerminalProcess, outlet: &Outlet) -> Result<Exit, Gone> {
    let TerminalProcess { terminal, mut child } = process;
    let pid = pid_of(&child);
    let inbox = outlet.inbox();
    let Ok(terminal) = watch(terminal) else {
        _ = outlet.error("mlad: there is no terminal left for this\r\n").await;
        return Ok(Exit::Status(75));
    };
    let running = async {
        pump_out(Terminal(Arc::clone(&terminal)), outlet, Output::Data).await?;
        Ok(exit_of(child.wait().await))
    };
    let input = feed(inbox, Terminal(Arc::clone(&terminal)));
    tokio::select! {
        exit = running => exit,
        _ = inbox.ended() => Err(Gone),
        never = async { tokio::join!(input, control(inbox, pid, Some(&terminal))).1 } => match never {},
    }
}

#[expect(deprecated, reason = "its successor is unsafe for types whose descriptor may change; this one's cannot")]
fn watch(terminal: OwnedFd) -> io::Result<Arc<AsyncFd<OwnedFd>>> {
    AsyncFd::new(terminal).map(Arc::new)
}

async fn feed<W: AsyncWrite + Unpin>(inbox: &Inbox, writer: W) -> Infallible {
    pump_in(inbox, writer).await;
    std::future::pending().await
}

async fn control(inbox: &Inbox, pid: Option<Pid>, terminal: Option<&AsyncFd<OwnedFd>>) -> Infallible {
    loop {
        match inbox.next_control().await {
            Control::Resize(size) => {
                if let Some(terminal) = terminal {
                    _ = tcsetwinsize(terminal.get_ref().as_fd(), winsize(size));
                }
            }
            Control::Signal(name) => {
                if let (Some(pid), Some(signal)) = (pid, signal_of(&name)) {
                    _ = kill_process(pid, signal);
                }
            }
        }
    }
}

/// The process is not waited for before its number was used for the last time, so it is its own.
fn pid_of(child: &Child) -> Option<Pid> {
    child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw)
}

fn winsize(size: PtySize) -> Winsize {
    let narrow = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    Winsize {
        ws_row: narrow(size.rows),
        ws_col: narrow(size.columns),
        ws_xpixel: narrow(size.width),
        ws_ypixel: narrow(size.height),
    }
}

/// The signals that mean something to a worker.
fn signal_of(name: &str) -> Option<Signal> {
    match name {
        "HUP" => Some(Signal::HUP),
        "INT" => Some(Signal::INT),
        "QUIT" => Some(Signal::QUIT),
        "TERM" => Some(Signal::TERM),
        "KILL" => Some(Signal::KILL),
        _ => None,
    }
}

fn exit_of(status: io::Result<ExitStatus>) -> Exit {
    let Ok(status) = status else { return Exit::Status(1) };
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Status(code.cast_unsigned()),
        (None, signal) => Exit::Signal {
            name: signal.map_or("KILL", name_of).into(),
            core_dumped: status.core_dumped(),
            message: String::new(),
        },
    }
}

fn name_of(signal: i32) -> &'static str {
    match signal {
        1 => "HUP",
        2 => "INT",
        3 => "QUIT",
        4 => "ILL",
        6 => "ABRT",
        8 => "FPE",
        11 => "SEGV",
        13 => "PIPE",
        14 => "ALRM",
        15 => "TERM",
        _ => "KILL",
    }
}

/// The other side of a terminal as a stream. Its end is an error (EIO), which the pump takes for one.
struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl AsyncRead for Terminal {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, target: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let room = target.initialize_unfilled();
            match guard.try_io(|terminal| Ok(rustix::io::read(terminal.get_ref(), &mut *room)?)) {
                Ok(Ok(count)) => {
                    target.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_) => {}
            }
        }
    }
}

impl AsyncWrite for Terminal {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            if let Ok(result) = guard.try_io(|terminal| Ok(rustix::io::write(terminal.get_ref(), bytes)?)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
