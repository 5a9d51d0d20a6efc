//! The way from the process to the gateway: output, answers, and how it ended. One writer, so that the order of the
//! frames is the order of this code.

use super::Terminal;
use crate::{
    agent::process::Process,
    channel::{ConnectionWriter, Frame},
};
use bytes::{Bytes, BytesMut};
use std::io;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{ChildStderr, ChildStdout},
    sync::mpsc,
};

/// Bytes of output in one frame, at most.
const OUTPUT: usize = 32 * 1024;
/// Most bytes that are still read from a terminal after the session's leader ended: more than it can hold, so that
/// nothing the leader wrote is lost, and bounded, since something in the background may go on writing.
const MAX_REST: usize = 256 * 1024;

/// Where the output of a process comes from.
#[derive(Debug)]
pub(super) enum Output<'a> {
    /// A terminal: it ends with the process.
    Terminal(&'a Terminal),
    /// Pipes: they end when everybody has closed them.
    Pipes(ChildStdout, ChildStderr),
    /// The gateway has it.
    Elsewhere,
}

/// Writes until the process has ended and its output is out. `frames` go out in between.
///
/// # Errors
/// When the gateway is gone.
pub(super) async fn send(
    writer: &mut ConnectionWriter,
    output: Output<'_>,
    process: &mut Process,
    frames: &mut mpsc::Receiver<Frame>,
) -> io::Result<()> {
    match output {
        Output::Terminal(terminal) => send_terminal(writer, terminal, process, frames).await?,
        Output::Pipes(stdout, stderr) => send_pipes(writer, stdout, stderr, frames).await?,
        Output::Elsewhere => {}
    }
    let exit = loop {
        tokio::select! {
            biased;
            Some(frame) = frames.recv() => writer.write(&frame).await?,
            exit = process.exit() => break exit,
        }
    };
    writer.write(&Frame::Exit(exit)).await
}

/// Writes frames, and nothing else any more.
pub(super) async fn send_frames(writer: &mut ConnectionWriter, frames: &mut mpsc::Receiver<Frame>) {
    while let Some(frame) = frames.recv().await {
        if writer.write(&frame).await.is_err() {
            return;
        }
    }
}

async fn send_terminal(
    writer: &mut ConnectionWriter,
    terminal: &Terminal,
    process: &mut Process,
    frames: &mut mpsc::Receiver<Frame>,
) -> io::Result<()> {
    let mut buffer = vec![0; OUTPUT];
    loop {
        tokio::select! {
            biased;
            Some(frame) = frames.recv() => writer.write(&frame).await?,
            _ = process.exit() => {
                send_rest(writer, terminal, &mut buffer).await?;
                break;
            }
            count = terminal.read(&mut buffer) => match count {
                Ok(count @ 1..) => writer.write(&data(buffer.get(..count).unwrap_or_default())).await?,
                _ => break,
            },
        }
    }
    writer.write(&Frame::Eof).await
}

async fn send_rest(writer: &mut ConnectionWriter, terminal: &Terminal, buffer: &mut [u8]) -> io::Result<()> {
    let mut sent = 0;
    while sent < MAX_REST {
        let count @ 1.. = terminal.read_now(buffer) else { break };
        writer.write(&data(buffer.get(..count).unwrap_or_default())).await?;
        sent += count;
    }
    Ok(())
}

fn data(bytes: &[u8]) -> Frame {
    Frame::Data(Bytes::copy_from_slice(bytes))
}

async fn send_pipes(
    writer: &mut ConnectionWriter,
    mut stdout: ChildStdout,
    mut stderr: ChildStderr,
    frames: &mut mpsc::Receiver<Frame>,
) -> io::Result<()> {
    let (mut stdout_open, mut stderr_open) = (true, true);
    let (mut out, mut err) = (BytesMut::new(), BytesMut::new());
    while stdout_open || stderr_open {
        tokio::select! {
            Some(frame) = frames.recv() => writer.write(&frame).await?,
            open = read(&mut stdout, &mut out), if stdout_open => {
                stdout_open = open;
                if open {
                    writer.write(&Frame::Data(out.split().freeze())).await?;
                }
            }
            open = read(&mut stderr, &mut err), if stderr_open => {
                stderr_open = open;
                if open {
                    writer.write(&Frame::ExtendedData(err.split().freeze())).await?;
                }
            }
        }
    }
    writer.write(&Frame::Eof).await
}

/// Reads some bytes; false at the end. Cancel-safe.
async fn read(pipe: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> bool {
    buffer.reserve(OUTPUT);
    matches!(pipe.read_buf(buffer).await, Ok(1..))
}
