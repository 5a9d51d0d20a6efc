//! The accept loop: takes connections in, within limits, and lets them end when the server stops.

use super::{
    algorithms::Transport,
    backend::Backend,
    connection::{self, DRAIN, Server},
    host_keys::{HostIdentity, HostKeyError},
    limits::{CodeTries, Sources, UserConnections},
};
use crate::{config::Config, store::Store};
use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, Semaphore},
    task::JoinSet,
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Longest pause when there are no descriptors left; a connection that ends makes it shorter.
const NO_DESCRIPTORS: Duration = Duration::from_millis(500);
/// Time until the log says so again.
const WARN_AGAIN: Duration = Duration::from_secs(10);
/// Time beyond the drain for connections to fall silent.
const LAST_MOMENT: Duration = Duration::from_secs(5);

/// What the server works with.
pub struct SshState {
    /// The settings.
    pub config: Arc<Config>,
    /// The database.
    pub store: Store,
    /// What is behind the door.
    pub backend: Arc<dyn Backend>,
}

/// Serves SSH on `listeners` until `shutdown` is cancelled: then takes no more connections, lets running
/// sessions end for ten seconds, says goodbye to the others, and returns.
///
/// # Errors
/// When the host keys cannot be read or made. Once it serves, nothing ends it but `shutdown`.
pub async fn serve(
    state: SshState,
    listeners: Vec<TcpListener>,
    shutdown: CancellationToken,
) -> Result<(), HostKeyError> {
    let SshState { config, store, backend } = state;
    let identity = HostIdentity::load(&config.data_directory.join("ssh"))?;
    let door = Arc::new(Door {
        connections: Arc::new(Semaphore::new(config.ssh.max_connections)),
        early: Arc::new(Semaphore::new(config.ssh.max_unauthenticated)),
        sources: Sources::new(config.ssh.max_unauthenticated),
        ended: Notify::new(),
        tasks: TaskTracker::new(),
        server: Arc::new(Server {
            transport: Transport::new(&config.ssh, &identity),
            users: UserConnections::default(),
            code_tries: CodeTries::new(config.ssh.enrolment_tries_per_minute),
            queued: Arc::default(),
            stop: shutdown.clone(),
            numbers: AtomicU64::new(1),
            config,
            store,
            backend,
        }),
    });
    let mut loops = JoinSet::new();
    for listener in listeners {
        loops.spawn(accept(Arc::clone(&door), listener, shutdown.clone()));
    }
    while loops.join_next().await.is_some() {}
    shutdown.cancelled().await;
    door.tasks.close();
    if tokio::time::timeout(DRAIN + LAST_MOMENT, door.tasks.wait()).await.is_err() {
        tracing::warn!(left = door.tasks.len(), "connections are still open; the server ends all the same");
    }
    Ok(())
}

/// What the accept loops share.
struct Door {
    server: Arc<Server>,
    connections: Arc<Semaphore>,
    early: Arc<Semaphore>,
    /// How many of `early` each source has.
    sources: Sources,
    /// Told when a connection has ended, and its descriptors are free.
    ended: Notify,
    tasks: TaskTracker,
}

async fn accept(door: Arc<Door>, listener: TcpListener, shutdown: CancellationToken) {
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "SSH listens");
    }
    let mut warned: Option<Instant> = None;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => take_in(&door, stream, peer),
            Err(error) if is_shortage(&error) => {
                if warned.is_none_or(|last| last.elapsed() > WARN_AGAIN) {
                    tracing::warn!(%error, "cannot accept connections; waiting for others to end");
                    warned = Some(Instant::now());
                }
                _ = tokio::time::timeout(NO_DESCRIPTORS, door.ended.notified()).await;
            }
            // The client was gone before it was taken in.
            Err(error) => tracing::debug!(%error, "a connection was not accepted"),
        }
    }
}

/// Starts to serve a connection, or drops it if there are too many.
fn take_in(door: &Arc<Door>, stream: TcpStream, peer: SocketAddr) {
    let Some(source) = door.sources.add(peer.ip()) else {
        tracing::warn!(%peer, "refused a connection: too many of this address have not logged in");
        _ = stream.try_write(b"Too many connections from your address; try again in a moment\r\n");
        return;
    };
    let permits = Arc::clone(&door.connections).try_acquire_owned();
    let (Ok(permit), Ok(early)) = (permits, Arc::clone(&door.early).try_acquire_owned()) else {
        tracing::warn!(%peer, "refused a connection: too many are open");
        _ = stream.try_write(b"Too many connections; try again in a moment\r\n");
        return;
    };
    let door = Arc::clone(door);
    let tasks = door.tasks.clone();
    tasks.spawn(async move {
        connection::serve(Arc::clone(&door.server), stream, peer, (early, source)).await;
        drop(permit);
        door.ended.notify_waiters();
    });
}

/// Whether the system has run out of something that comes back.
fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM]
        .contains(&Errno::from_io_error(error).unwrap_or(Errno::IO))
}
