//! The HTTP API inside the container: every connection to its socket is handed to the gateway over the control
//! connection. While there is none it waits a while, and is then told so in HTTP.

use super::{
    incoming::{self, accept_each},
    limits,
    server::Shared,
};
use crate::{
    api::{ApiError, ErrorCode},
    channel::{Connection, Frame},
};
use std::{io, sync::Arc};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::Instant,
};

/// Announcements on their way to the gateway.
const ANNOUNCEMENTS: usize = 16;
/// Most bytes of a request that are read so that the answer to it is not lost.
const MAX_UNREAD: u64 = 64 * 1024;

/// The gateway's control connection, as far as there is one. A new one takes the place of the old, which ends
/// because nobody can send to it any more.
#[derive(Debug)]
pub(super) struct Gateway {
    current: watch::Sender<Option<mpsc::Sender<Frame>>>,
    waiting: Arc<Semaphore>,
}

impl Default for Gateway {
    fn default() -> Self {
        Self { current: watch::Sender::new(None), waiting: Arc::new(Semaphore::new(limits::API_WAITING)) }
    }
}

/// Serves the control connection to its end.
///
/// # Errors
/// When it fails.
pub(super) async fn control(mut connection: Connection, shared: &Shared) -> io::Result<()> {
    connection.writer.write(&Frame::Opened { port: 0 }).await?;
    let Connection { mut reader, mut writer } = connection;
    let (sender, mut announcements) = mpsc::channel(ANNOUNCEMENTS);
    let gateway = &shared.gateway.current;
    gateway.send_replace(Some(sender));
    let write = async {
        while let Some(frame) = announcements.recv().await {
            writer.write(&frame).await?;
        }
        Ok(())
    };
    let result = tokio::select! {
        result = write => result,
        () = super::forward::closed(&mut reader) => Ok(()),
    };
    drop(announcements);
    gateway.send_if_modified(|current| current.take_if(|sender| sender.is_closed()).is_some());
    result
}

/// Takes connections to the API socket for as long as the agent lives.
pub(super) async fn accept(listener: UnixListener, shared: &Arc<Shared>) {
    let accept = async || listener.accept().await.map(|(stream, _)| stream);
    let serve = |stream, permit| {
        // Here and not in the task, so that those who came first wait and not those who run first.
        let place = Arc::clone(&shared.gateway.waiting).try_acquire_owned().ok();
        let task = Arc::clone(shared);
        shared.spawn(async move {
            let _permit = permit;
            match place {
                Some(place) => hand_over(stream, place, &task).await,
                None => answer(stream, "too many connections wait for the gateway").await,
            }
        });
    };
    accept_each(limits::API_CONNECTIONS, "the API socket", accept, serve).await;
}

async fn hand_over(stream: UnixStream, place: OwnedSemaphorePermit, shared: &Shared) -> io::Result<()> {
    let originator = stream
        .peer_cred()
        .map_or_else(|_| String::new(), |peer| format!("uid {} pid {}", peer.uid(), peer.pid().unwrap_or_default()));
    let guest = tokio::time::timeout_at(Instant::now() + limits::API_TIME, taken(&originator, shared)).await;
    drop(place);
    match guest {
        Ok(guest) => incoming::join(guest, Box::new(stream)).await,
        Err(_) => answer(stream, "the gateway is being restarted").await,
    }
}

/// Announces a connection until a gateway takes it; once more to every new gateway.
async fn taken(originator: &str, shared: &Shared) -> super::ticket::Guest {
    let mut gateway = shared.gateway.current.subscribe();
    loop {
        let ticket = shared.tickets.issue();
        let frame = Frame::Incoming { ticket: ticket.number, originator: originator.into(), originator_port: 0 };
        let there = |current: &Option<mpsc::Sender<Frame>>| current.as_ref().is_some_and(|sender| !sender.is_closed());
        let Ok(sender) = gateway.wait_for(there).await.map(|current| current.clone()) else {
            std::future::pending().await
        };
        let Some(sender) = sender else { continue };
        if sender.send(frame).await.is_err() {
            continue;
        }
        drop(sender);
        tokio::select! {
            Some(guest) = ticket.taken(limits::API_TIME) => return guest,
            _ = gateway.changed() => {}
        }
    }
}

/// Answers any request with 503, in the form of every error of the API.
async fn answer(mut stream: UnixStream, why: &str) -> io::Result<()> {
    let error = ApiError::new(ErrorCode::Unavailable, why).hint("try again in a few seconds");
    let body = serde_json::to_string(&error)?;
    let head =
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\nconnection: close";
    stream.write_all(format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes()).await?;
    stream.shutdown().await?;
    // Closing with a request unread would reset the connection under the answer.
    let rest = async { tokio::io::copy(&mut stream.take(MAX_UNREAD), &mut tokio::io::sink()).await };
    let _ = tokio::time::timeout(limits::FAREWELL, rest).await;
    Ok(())
}
