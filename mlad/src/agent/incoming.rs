//! Whoever connects to a listener of the user is announced to the gateway by a ticket, and joined to it when it
//! takes the ticket.

use super::{limits, server::Shared, splice, splice::ByteStream, ticket::Guest};
use crate::channel::Frame;
use std::{io, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tokio_util::sync::CancellationToken;

/// After accept failed for want of descriptors or memory: how long until the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Takes connections for as long as the agent lives, at most so many at once: each has its place until `serve` or what it
/// starts lets go of that. `on` is for the log.
pub(super) async fn accept_each<S>(
    most: usize,
    on: &str,
    mut accept: impl AsyncFnMut() -> io::Result<S>,
    mut serve: impl FnMut(S, OwnedSemaphorePermit),
) {
    let places = Arc::new(Semaphore::new(most));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match accept().await {
            Ok(stream) => serve(stream, place),
            Err(error) => {
                tracing::warn!(%error, on, "cannot accept; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Where connections come from.
#[derive(Debug)]
pub(super) enum Listener<'a> {
    Tcp(&'a TcpListener),
    /// A Unix socket: nothing is known of who connects but that the kernel let them.
    Unix(&'a UnixListener),
}

struct Arrival {
    stream: Box<dyn ByteStream>,
    originator: String,
    port: u32,
}

impl Listener<'_> {
    async fn accept(&self) -> io::Result<Arrival> {
        match self {
            Self::Tcp(listener) => {
                let (stream, from) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let (originator, port) = (from.ip().to_canonical().to_string(), from.port().into());
                Ok(Arrival { stream: Box::new(stream), originator, port })
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                Ok(Arrival { stream: Box::new(stream), originator: String::new(), port: 0 })
            }
        }
    }
}

/// Announces connections for as long as frames can be sent. When this is dropped, those that were not taken
/// are refused; those that were go on.
pub(super) async fn announce(listener: Listener<'_>, frames: mpsc::Sender<Frame>, shared: &Arc<Shared>) {
    let pending = Arc::new(Semaphore::new(limits::PENDING));
    let listening = CancellationToken::new();
    let _end = listening.clone().drop_guard();
    loop {
        let Ok(permit) = Arc::clone(&pending).acquire_owned().await else { return };
        let Arrival { stream, originator, port: originator_port } = match listener.accept().await {
            Ok(arrival) => arrival,
            Err(error) => {
                tracing::warn!(%error, "cannot accept for the user; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let ticket = shared.tickets.issue();
        let frame = Frame::Incoming { ticket: ticket.number, originator, originator_port };
        if frames.send(frame).await.is_err() {
            return;
        }
        let listening = listening.clone();
        shared.spawn(async move {
            let taken = tokio::select! {
                taken = ticket.taken(limits::TICKET_TIME) => taken,
                () = listening.cancelled() => None,
            };
            drop(permit);
            if let Some(guest) = taken {
                join(guest, stream).await?;
            }
            Ok(())
        });
    }
}

/// Opens the gateway's connection and joins it to a stream.
///
/// # Errors
/// When one of them fails.
pub(super) async fn join(guest: Guest, stream: Box<dyn ByteStream>) -> io::Result<()> {
    let Guest { mut connection, permit } = guest;
    connection.writer.write(&Frame::Opened { port: 0 }).await?;
    let result = splice::join(connection.into_stream(), stream).await;
    drop(permit);
    result
}
