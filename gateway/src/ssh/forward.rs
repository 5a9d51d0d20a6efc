//! Forwarding: connections from the client into the workspace, and from the workspace to the client.

use super::{
    agent::{PROMPTLY, REACHING, Refused, clean, dial, kind_of},
    backend::Place,
    client::Client,
    inbox::Inbox,
    outlet::Outlet,
    pump::{Output, pump_in, pump_out},
};
use mlad::channel::{Connection, Frame, Open, Stream};
use russh::{
    Channel, ChannelOpenFailure,
    server::{ChannelOpenHandle, Msg},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Listeners of one connection.
const MAX_LISTENERS: usize = 64;
/// Announced connections of one listener or session on their way to the client at once.
const MAX_ANNOUNCED: usize = 32;
/// Time a connection has, after asking for a listener, to open the session that says which workspace is meant.
const SESSION_COMES: Duration = Duration::from_secs(2);
/// Time the last bytes of a closed channel have to be taken.
const DELIVERING: Duration = Duration::from_secs(60);
/// Time a client waits for a port of the server's choice. Its connection stands still meanwhile.
const PORT_COMES: Duration = Duration::from_secs(10);

/// What a client wants listened on in its workspace.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Listen {
    /// TCP.
    Tcp {
        /// As the client named it.
        address: String,
        /// Its port.
        port: u32,
    },
    /// A Unix socket.
    Socket(String),
}

/// The listeners of a connection.
#[derive(Default)]
pub(super) struct Listeners(Mutex<HashMap<Listen, Listener>>);

enum Listener {
    /// Asked for before anybody was in the workspace.
    Pending,
    /// Listens until it is cancelled.
    Listening(CancellationToken),
}

impl Listeners {
    fn all(&self) -> MutexGuard<'_, HashMap<Listen, Listener>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_room_for(&self, listen: &Listen) -> bool {
        let all = self.all();
        all.len() < MAX_LISTENERS && !all.contains_key(listen)
    }

    fn take_pending(&self) -> Vec<Listen> {
        let mut all = self.all();
        let pending = all.extract_if(|_, listener| matches!(listener, Listener::Pending));
        pending.map(|(listen, _)| listen).collect()
    }

    /// Ends a listener; false if there is none.
    pub(super) fn cancel(&self, listen: &Listen) -> bool {
        match self.all().remove(listen) {
            Some(Listener::Listening(token)) => {
                token.cancel();
                true
            }
            Some(Listener::Pending) => true,
            None => false,
        }
    }
}

/// Serves a channel into the workspace: opens it there first, and only then tells the client.
pub(super) async fn direct(
    client: Arc<Client>,
    channel: Channel<Msg>,
    inbox: Arc<Inbox>,
    reply: ChannelOpenHandle,
    open: Open,
) {
    let outlet = client.outlet(channel, inbox);
    let opened = tokio::select! {
        opened = reach(&client, open) => opened,
        () = client.lost.cancelled() => return,
    };
    match opened {
        Ok(stream) => {
            reply.accept().await;
            bridge(stream, &outlet).await;
        }
        Err(refused) => {
            tracing::info!(reason = refused.message, "a forwarded connection was not opened");
            reply.reject(failure(refused)).await;
        }
    }
}

async fn reach(client: &Client, open: Open) -> Result<Stream, Refused> {
    let place =
        client.workplace.join().await.map_err(|refusal| Refused { reason: 2, message: refusal.lines.join("; ") })?;
    Ok(dial(&*place, open, REACHING).await?.0.into_stream())
}

/// The texts of the reasons of RFC 4254 are fixed in russh; ours goes along.
fn failure(Refused { reason, message }: Refused) -> ChannelOpenFailure {
    ChannelOpenFailure::Other { code: reason.clamp(1, 4), reason: message }
}

/// Bytes both ways until both have ended, or the channel is over. A client that has no more to say and has
/// heard the end closes at once; what it said before is still delivered.
async fn bridge(stream: Stream, outlet: &Outlet) {
    let (reader, writer) = tokio::io::split(stream);
    let inbox = outlet.inbox();
    let inward = async {
        tokio::select! {
            () = pump_in(inbox, writer) => {}
            () = async { inbox.ended().await; tokio::time::sleep(DELIVERING).await } => {}
        }
    };
    let outward = async {
        tokio::select! {
            sent = pump_out(reader, outlet, Output::Data) => if sent.is_ok() { _ = outlet.eof().await },
            _ = inbox.ended() => {}
        }
    };
    tokio::join!(inward, outward);
    outlet.close().await;
}

/// Listens in the workspace for the client; the port it got, or none if it cannot be.
///
/// The answer is waited for by the connection's loop, and a client asks for this before it opens a session.
/// So if nobody is in the workspace yet, the answer is yes, and it is done when the first session is in,
/// before that starts anything ([`listen_pending`]) — or on its own if no session comes. Only a port of the
/// server's choice has to be known at once.
pub(super) async fn listen(client: &Arc<Client>, listen: Listen) -> Option<u32> {
    if !client.listeners.has_room_for(&listen) {
        return None;
    }
    let free_port = matches!(listen, Listen::Tcp { port: 0, .. });
    let place = match client.workplace.current() {
        Some(place) => Some(place),
        None if free_port => tokio::time::timeout(PORT_COMES, client.workplace.join()).await.ok()?.ok(),
        None => None,
    };
    match place {
        Some(place) => start_listening(client, &*place, listen).await.inspect_err(log_refusal).ok(),
        None if free_port => None,
        None => {
            listen_later(client, listen);
            Some(0)
        }
    }
}

/// Does what was put off until somebody was in the workspace; returns what went wrong, for the person.
pub(super) async fn listen_pending(client: &Arc<Client>, place: &dyn Place) -> Vec<String> {
    let mut failed = Vec::new();
    for listen in client.listeners.take_pending() {
        let name = listen.to_string();
        if let Err(refused) = start_listening(client, place, listen).await {
            log_refusal(&refused);
            failed.push(format!("nothing listens on {name} in the workspace: {}", refused.message));
        }
    }
    failed
}

fn listen_later(client: &Arc<Client>, listen: Listen) {
    client.listeners.all().insert(listen, Listener::Pending);
    let owner = Arc::clone(client);
    client.spawn(async move {
        let alone = async {
            tokio::time::sleep(SESSION_COMES).await;
            // A session on its way in does it itself.
            if !owner.workplace.is_being_entered() {
                match owner.workplace.join().await {
                    Ok(place) => _ = listen_pending(&owner, &*place).await,
                    Err(refusal) => tracing::info!(reason = refusal.lines.join("; "), "nothing listens"),
                }
            }
        };
        tokio::select! {
            () = alone => {}
            () = owner.lost.cancelled() => {}
        }
    });
}

async fn start_listening(client: &Arc<Client>, place: &dyn Place, mut listen: Listen) -> Result<u32, Refused> {
    let open = match &listen {
        Listen::Tcp { address, port } => Open::TcpipForward { address: address.clone(), port: *port },
        Listen::Socket(path) => Open::StreamlocalForward { path: path.clone() },
    };
    let (connection, bound) = dial(place, open, PROMPTLY).await?;
    if let Listen::Tcp { port, .. } = &mut listen
        && *port == 0
    {
        *port = bound;
    }
    let token = client.lost.child_token();
    client.listeners.all().insert(listen.clone(), Listener::Listening(token.clone()));
    let announcements = Announcements::new(client, place, Some(listen.clone()));
    let owner = Arc::clone(client);
    client.spawn(async move {
        tokio::select! {
            () = announce(connection, &announcements) => {
                owner.listeners.cancel(&listen);
            }
            () = token.cancelled() => {}
        }
    });
    Ok(bound)
}

async fn announce(mut connection: Connection, announcements: &Announcements) {
    loop {
        match connection.reader.read().await {
            Ok(Some(Frame::Incoming { ticket, originator, originator_port })) => {
                announcements.listener(ticket, clean(&originator), originator_port);
            }
            Ok(Some(frame)) => {
                tracing::warn!(frame = kind_of(&frame), "an agent sent what does not belong to a listener");
                return;
            }
            Ok(None) | Err(_) => return,
        }
    }
}

fn log_refusal(refused: &Refused) {
    tracing::info!(reason = refused.message, "nothing listens in the workspace");
}

/// Connections that the agent announces, on their way to the client.
pub(super) struct Announcements {
    client: Arc<Client>,
    place: Arc<dyn Place>,
    /// What they come from; none for the key agent.
    listen: Option<Listen>,
    /// Whether the client has allowed them.
    allowed: bool,
    room: Arc<Semaphore>,
}

impl Announcements {
    fn new(client: &Arc<Client>, place: &dyn Place, listen: Option<Listen>) -> Self {
        let room = Arc::new(Semaphore::new(MAX_ANNOUNCED));
        Self { client: Arc::clone(client), place: place.another().into(), listen, allowed: true, room }
    }

    /// Those of a session: they go to the client's key agent, if it has asked for that.
    pub(super) fn of_session(client: &Arc<Client>, place: &dyn Place, allowed: bool) -> Self {
        Self { allowed, ..Self::new(client, place, None) }
    }

    /// Somebody wants the client's key agent.
    pub(super) fn key_agent(&self, ticket: u64) {
        self.bring(ticket, String::new(), 0);
    }

    fn listener(&self, ticket: u64, originator: String, port: u32) {
        self.bring(ticket, originator, port);
    }

    /// One that is too many is left waiting, which the agent ends.
    fn bring(&self, ticket: u64, originator: String, port: u32) {
        let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() else { return };
        if !self.allowed || !self.client.has_room() {
            return;
        }
        let (client, place, listen) = (Arc::clone(&self.client), Arc::clone(&self.place), self.listen.clone());
        self.client.spawn(async move {
            tokio::select! {
                () = bring(&client, &*place, listen, ticket, originator, port, permit) => {}
                () = client.lost.cancelled() => {}
            }
        });
    }
}

async fn bring(
    client: &Arc<Client>,
    place: &dyn Place,
    listen: Option<Listen>,
    ticket: u64,
    originator: String,
    port: u32,
    permit: tokio::sync::OwnedSemaphorePermit,
) {
    let handle = &client.handle;
    let opened = match listen {
        None => handle.channel_open_agent().await,
        Some(Listen::Tcp { address, port: bound }) => {
            handle.channel_open_forwarded_tcpip(address, bound, originator, port).await
        }
        Some(Listen::Socket(path)) => handle.channel_open_forwarded_streamlocal(path).await,
    };
    // Taken in any case: one that the client refused ends at once, instead of waiting.
    let taken = dial(place, Open::Accept { ticket }, PROMPTLY).await;
    drop(permit);
    let Ok(channel) = opened else { return };
    let id = channel.id();
    let outlet = client.outlet(channel, client.take_inbox(id));
    match taken {
        Ok((connection, _)) => bridge(connection.into_stream(), &outlet).await,
        Err(_) => outlet.close().await,
    }
    client.end_channel(id, super::inbox::End::Closed);
}

impl std::fmt::Display for Listen {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp { address, port } if address.is_empty() => write!(formatter, "port {port}"),
            Self::Tcp { address, port } => write!(formatter, "{}:{port}", clean(address)),
            Self::Socket(path) => formatter.write_str(&clean(path)),
        }
    }
}
