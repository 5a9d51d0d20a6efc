//! A session: what the client of one SSH channel sets up, the process it starts, and the bytes between them.
//!
//! While the process runs three things go on side by side, and none waits for another: frames from the gateway
//! ([`follow`]), [`input`] to the process, [`output`] from it.

mod input;
mod output;
mod setup;

use super::{
    incoming::{Listener, announce},
    process::{Process, signal_of},
    server::Shared,
    terminal::Terminal,
    unix::UserListener,
};
use crate::channel::{Connection, ConnectionReader, Frame, Request};
use input::{InputQueue, Sink};
use output::Output;
use rustix::process::Signal;
use setup::{Started, Wiring};
use std::{future::pending, io, sync::Arc};
use tokio::sync::mpsc;

/// Frames on their way to the writer.
const FRAMES: usize = 16;

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The client closed its channel.
    Closed,
    /// The connection is gone, or of no more use.
    Lost,
}

/// Serves a session to its end.
///
/// # Errors
/// When the gateway goes away, or says what is no protocol, before anything was started.
pub(super) async fn serve(mut connection: Connection, shared: &Arc<Shared>) -> io::Result<()> {
    connection.writer.write(&Frame::Opened { port: 0 }).await?;
    let Some(mut started) = setup::negotiate(&mut connection, shared).await? else { return Ok(()) };
    let (process, key_agent) = (started.process.clone(), started.key_agent.take());
    if run(connection, started, key_agent.as_ref(), shared).await == End::Closed {
        process.signal(Signal::HUP);
    }
    if let Some(key_agent) = key_agent {
        key_agent.remove(&shared.rights).await;
    }
    Ok(())
}

/// Runs until the gateway closes. The terminal or the pipes are let go with it.
async fn run(connection: Connection, started: Started, key_agent: Option<&UserListener>, shared: &Arc<Shared>) -> End {
    let Connection { mut reader, mut writer } = connection;
    let Started { process, wiring, .. } = started;
    let (sender, mut frames) = mpsc::channel(FRAMES);
    let input = InputQueue::default();
    let framed = !matches!(wiring, Wiring::Descriptors);
    let (terminal, pipes) = match wiring {
        Wiring::Terminal(terminal) => (Some(terminal), None),
        Wiring::Pipes(stdin, stdout, stderr) => (None, Some((stdin, stdout, stderr))),
        Wiring::Descriptors => (None, None),
    };
    let (sink, output) = match (&terminal, pipes) {
        (Some(terminal), _) => (Sink::Terminal(terminal), Output::Terminal(terminal)),
        (None, Some((stdin, stdout, stderr))) => (Sink::Pipe(stdin), Output::Pipes(stdout, stderr)),
        (None, None) => (Sink::Nowhere, Output::Elsewhere),
    };
    let told = shared.tasks.token();
    let outward = async {
        let mut process = process.clone();
        let sent = output::send(&mut writer, output, &mut process, &mut frames).await;
        drop(told);
        match sent {
            Ok(()) if framed => writer.finish(),
            Ok(()) => output::send_frames(&mut writer, &mut frames).await,
            Err(_) => {}
        }
        input.discard();
        pending::<()>().await;
    };
    let inward = input.feed(sink, &sender);
    let control = Control { process: &process, terminal: terminal.as_ref(), input: &input, frames: &sender };
    let announcing = async {
        if let Some(UserListener { listener, .. }) = key_agent {
            announce(Listener::Unix(listener), sender.clone(), shared).await;
        }
    };
    // Output and input may be over before the session is: its end is the gateway's to say.
    tokio::select! {
        biased;
        end = follow(&mut reader, &control) => end,
        _ = async { tokio::join!(outward, inward, announcing) } => End::Lost,
    }
}

/// What frames act upon.
struct Control<'a> {
    process: &'a Process,
    terminal: Option<&'a Terminal>,
    input: &'a InputQueue,
    frames: &'a mpsc::Sender<Frame>,
}

/// Obeys the gateway's frames until it closes.
async fn follow(reader: &mut ConnectionReader, control: &Control<'_>) -> End {
    loop {
        match reader.read().await {
            Ok(Some(Frame::Data(bytes))) if control.input.try_push(&bytes) => {}
            Ok(Some(Frame::Data(bytes))) => {
                let Ok(gone) = reader.hang_up() else { return End::Lost };
                tokio::select! {
                    biased;
                    () = control.input.push(&bytes) => {}
                    () = gone.wait() => return End::Lost,
                }
            }
            Ok(Some(Frame::Eof)) => control.input.end(),
            Ok(Some(Frame::Request(request))) => control.obey(request).await,
            Ok(Some(Frame::Close)) => return End::Closed,
            Ok(Some(other)) => {
                tracing::warn!(frame = ?other, "the gateway sent what does not belong in a session; closing it");
                return End::Lost;
            }
            Ok(None) => return End::Lost,
            Err(error) => {
                tracing::warn!(%error, "a session's connection failed");
                return End::Lost;
            }
        }
    }
}

impl Control<'_> {
    async fn obey(&self, request: Request) {
        let answered = request.is_answered();
        match (request, self.terminal) {
            (Request::WindowChange(size), Some(terminal)) => {
                let _ = terminal.resize(size);
            }
            (Request::Signal { name }, _) => match signal_of(&name) {
                Some(signal) => self.process.signal(signal),
                None => tracing::debug!(name, "a signal that has no name in RFC 4254"),
            },
            _ => {}
        }
        if answered {
            let message = "the session has started already".to_owned();
            let _ = self.frames.send(Frame::Failure { message }).await;
        }
    }
}
