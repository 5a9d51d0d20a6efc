//! A session whose bytes travel in frames: on a terminal, or with an agent on another machine.

use super::{
    agent::{self, bounded, kind_of},
    forward::Announcements,
    inbox::{Control, End, Inbox},
    outlet::{Gone, Outlet},
};
use bytes::Bytes;
use mlad::channel::{Connection, ConnectionReader, ConnectionWriter, Exit, Frame, Request, WINDOW};
use std::io;
use tokio::sync::Semaphore;

/// Most bytes an agent may ever let us send at once.
const MAX_WINDOW: usize = 16 * 1024 * 1024;

/// Serves the session until its process has ended; none if the agent is lost before that.
pub(super) async fn serve(
    connection: Connection,
    outlet: &Outlet,
    announcements: &Announcements,
) -> Result<Option<Exit>, Gone> {
    let Connection { mut reader, mut writer } = connection;
    let window = Semaphore::new(WINDOW);
    let served = tokio::select! {
        exit = read(&mut reader, outlet, &window, announcements) => exit,
        _ = write(&mut writer, outlet.inbox(), &window) => Ok(None),
    };
    // What the user closes is over at once; what was merely lost is hung up by the agent.
    if served.is_err() && outlet.inbox().ended().await == End::Closed {
        agent::close(writer).await;
    }
    served
}

async fn read(
    reader: &mut ConnectionReader,
    outlet: &Outlet,
    window: &Semaphore,
    announcements: &Announcements,
) -> Result<Option<Exit>, Gone> {
    loop {
        let frame = tokio::select! {
            frame = reader.read() => frame,
            _ = outlet.inbox().ended() => return Err(Gone),
        };
        match frame {
            Ok(Some(Frame::Data(bytes))) => outlet.data(bytes).await?,
            Ok(Some(Frame::ExtendedData(bytes))) => outlet.error(bytes).await?,
            Ok(Some(Frame::WindowAdjust { bytes })) => widen(window, bytes),
            Ok(Some(Frame::Incoming { ticket, .. })) => announcements.key_agent(ticket),
            Ok(Some(Frame::Exit(exit))) => return Ok(Some(bounded(exit))),
            Ok(Some(Frame::Eof)) => {}
            Ok(Some(Frame::Close) | None) => return Ok(None),
            Ok(Some(frame)) => {
                tracing::warn!(frame = kind_of(&frame), "an agent sent what does not belong into a session");
                return Ok(None);
            }
            Err(error) => {
                tracing::info!(%error, "an agent is lost");
                return Ok(None);
            }
        }
    }
}

fn widen(window: &Semaphore, bytes: u32) {
    let room = MAX_WINDOW.saturating_sub(window.available_permits());
    window.add_permits(room.min(bytes as usize));
}

/// Never ends but by an error: after the end of the input there may still be signals.
async fn write(writer: &mut ConnectionWriter, inbox: &Inbox, window: &Semaphore) -> io::Result<()> {
    let mut piece = Bytes::new();
    let mut open = true;
    loop {
        tokio::select! {
            biased;
            control = inbox.next_control() => writer.write(&Frame::Request(control.into())).await?,
            next = inbox.next_data(), if piece.is_empty() && open => match next {
                Some(next) => piece = next,
                None => {
                    open = false;
                    writer.write(&Frame::Eof).await?;
                }
            },
            permit = window.acquire(), if !piece.is_empty() => {
                let Ok(permit) = permit else { return Ok(()) };
                let count = piece.len().min(1 + window.available_permits());
                permit.forget();
                window.forget_permits(count - 1);
                writer.write(&Frame::Data(piece.split_to(count))).await?;
            }
        }
    }
}

impl From<Control> for Request {
    fn from(control: Control) -> Self {
        match control {
            Control::Resize(size) => Self::WindowChange(size),
            Control::Signal(name) => Self::Signal { name },
        }
    }
}
