//! The accept loop: takes connections in, within limits, and lets them end when the server stops.

use super::{
    algorithms::Transport,
    backend::Backend,
    client::Ends,
    connection::{self, DRAIN, Server, Settings},
    host_keys::{self, HostIdentity, HostKeyError},
    limits::{CodeTries, Counted, Counter, SourceSlot, Sources, UserConnections, early_drop_percent},
    penalties::Penalties,
    proxy_header::{Header, read_header},
};
use crate::{
    config::{Config, IpNetwork, Ssh},
    store::Store,
};
use rand::RngExt as _;
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, watch},
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
/// Time a load balancer has to say from where a connection comes.
const HEADER_COMES: Duration = Duration::from_secs(5);

/// What the server works with.
pub struct SshState {
    /// The settings; those that have changed hold for connections to come.
    pub config: watch::Receiver<Arc<Config>>,
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
    let SshState { config: mut changes, store, backend } = state;
    let config = Arc::clone(&changes.borrow_and_update());
    let door = Arc::new(Door {
        connections: Counter::default(),
        early: Counter::default(),
        sources: Sources::default(),
        penalties: Penalties::default(),
        ended: Notify::new(),
        tasks: TaskTracker::new(),
        server: Arc::new(Server {
            users: UserConnections::default(),
            code_tries: CodeTries::new(config.ssh.enrolment_tries_per_minute),
            settings: watch::Sender::new(Arc::new(settings(config)?)),
            queued: Arc::default(),
            stop: shutdown.clone(),
            numbers: AtomicU64::new(1),
            store,
            backend,
        }),
    });
    let mut loops = JoinSet::new();
    loops.spawn(follow(Arc::clone(&door), changes, shutdown.clone()));
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
    connections: Counter,
    /// Those that have not logged in.
    early: Counter,
    /// How many of `early` each source has.
    sources: Sources,
    penalties: Penalties,
    /// Told when a connection has ended, and its descriptors are free.
    ended: Notify,
    tasks: TaskTracker,
}

/// The settings of connections to come, with the host keys as they lie there now.
fn settings(config: Arc<Config>) -> Result<Settings, HostKeyError> {
    let identity = HostIdentity::load(&config.data_directory.join(host_keys::FOLDER))?;
    Ok(Settings { transport: Transport::new(&config.ssh, &identity), config })
}

/// Takes up settings that have changed. Nobody who is connected notices.
async fn follow(door: Arc<Door>, mut changes: watch::Receiver<Arc<Config>>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = shutdown.cancelled() => return,
        }
        let config = Arc::clone(&changes.borrow_and_update());
        // A few small files, and seldom.
        match settings(config) {
            Ok(settings) => {
                door.server.settings.send_replace(Arc::new(settings));
                tracing::info!("connections to come have the settings and host keys as they are now");
            }
            Err(error) => tracing::error!(%error, "SSH goes on with the settings and host keys it has"),
        }
    }
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

/// Why a connection is turned away: what it is told, and the log.
struct Refused(&'static str);

const TOO_MANY: Refused = Refused("Too many connections; try again in a moment");
const TOO_MANY_FROM_THERE: Refused = Refused("Too many connections from your address; try again in a moment");
const PENALTY: Refused = Refused("Too many failed connections from your address; try again in some minutes");

/// Starts to serve a connection, or drops it if there are too many.
fn take_in(door: &Arc<Door>, stream: TcpStream, peer: SocketAddr) {
    let settings = door.server.settings();
    let ssh = &settings.config.ssh;
    let balanced = is_in(&ssh.proxy_protocol_from, peer.ip());
    // Who comes through a load balancer is met once it has said who that is.
    let known = if balanced { Ok(None) } else { meet(door, ssh, peer.ip()).map(Some) };
    let admitted = known.and_then(|source| Ok((source, make_room(door, ssh)?)));
    let (source, (permit, early)) = match admitted {
        Ok(admitted) => admitted,
        Err(refused) => return turn_away(&stream, peer, &refused),
    };
    let door = Arc::clone(door);
    let tasks = door.tasks.clone();
    tasks.spawn(async move {
        serve_one(&door, stream, peer, source, early).await;
        drop(permit);
        door.ended.notify_waiters();
    });
}

async fn serve_one(door: &Door, mut stream: TcpStream, peer: SocketAddr, source: Option<SourceSlot>, early: Counted) {
    let Ok(local) = stream.local_addr() else { return };
    let (ends, source) = match source {
        Some(source) => (Ends { peer, local }, source),
        None => {
            let Some(ends) = said_by_balancer(door, &mut stream, Ends { peer, local }).await else { return };
            let settings = door.server.settings();
            match meet(door, &settings.config.ssh, ends.peer.ip()) {
                Ok(source) => (ends, source),
                Err(refused) => return turn_away(&stream, ends.peer, &refused),
            }
        }
    };
    let offence = connection::serve(Arc::clone(&door.server), stream, ends, (early, source)).await;
    let settings = door.server.settings();
    let ssh = &settings.config.ssh;
    if let Some(offence) = offence
        && !is_exempt(ssh, ends.peer.ip())
    {
        let most = Duration::from_secs(ssh.max_penalty_seconds);
        door.penalties.add(ends.peer.ip(), offence, most, Instant::now());
    }
}

/// From where to where a connection goes, as its load balancer says; none if it says nothing sensible.
async fn said_by_balancer(door: &Door, stream: &mut TcpStream, ends: Ends) -> Option<Ends> {
    let read = tokio::select! {
        read = tokio::time::timeout(HEADER_COMES, read_header(stream)) => read,
        () = door.server.stop.cancelled() => return None,
    };
    let peer = ends.peer;
    match read {
        Ok(Ok(Header::Forwarded { source, destination })) => Some(Ends { peer: source, local: destination }),
        Ok(Ok(Header::Own)) => Some(ends),
        Ok(Err(error)) => {
            tracing::warn!(%peer, %error, "a load balancer's connection was dropped (ssh.proxy_protocol_from)");
            None
        }
        Err(_) => {
            tracing::warn!(%peer, "a load balancer did not say in time who connects; dropped");
            None
        }
    }
}

/// Whether a source may come in now: it has its part of the door, and no penalty.
fn meet(door: &Door, ssh: &Ssh, source: IpAddr) -> Result<SourceSlot, Refused> {
    if !is_exempt(ssh, source) && door.penalties.holds(source, Instant::now()) {
        return Err(PENALTY);
    }
    door.sources.add(source, ssh.max_unauthenticated).ok_or(TOO_MANY_FROM_THERE)
}

/// Counts a connection, and that it has not logged in; by chance not, when many have not.
fn make_room(door: &Door, ssh: &Ssh) -> Result<(Counted, Counted), Refused> {
    let chance =
        early_drop_percent(door.early.count(), ssh.early_drop_from, ssh.early_drop_percent, ssh.max_unauthenticated);
    if chance > 0 && rand::rng().random_range(0..100) < chance {
        return Err(TOO_MANY);
    }
    let connection = door.connections.add(ssh.max_connections).ok_or(TOO_MANY)?;
    Ok((connection, door.early.add(ssh.max_unauthenticated).ok_or(TOO_MANY)?))
}

fn turn_away(stream: &TcpStream, peer: SocketAddr, Refused(words): &Refused) {
    tracing::warn!(%peer, reason = words, "refused a connection");
    _ = stream.try_write(format!("{words}\r\n").as_bytes());
}

/// Whether a source is never shut out: a load balancer's own connections come to nothing by their nature.
fn is_exempt(ssh: &Ssh, source: IpAddr) -> bool {
    is_in(&ssh.penalty_exempt, source) || is_in(&ssh.proxy_protocol_from, source)
}

fn is_in(networks: &[IpNetwork], address: IpAddr) -> bool {
    let address = address.to_canonical();
    networks.iter().any(|network| network.contains(address))
}

/// Whether the system has run out of something that comes back.
fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM]
        .contains(&Errno::from_io_error(error).unwrap_or(Errno::IO))
}
