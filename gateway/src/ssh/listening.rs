//! What listens in the workspace for the client (`-R`): asked for, put off until somebody is there, ended.
//!
//! A client asks for its listeners before it opens a session, and its connection stands still until it is
//! answered; but only the session says what the workspace is to be made of. So the truth is told where a workspace
//! runs already, and where none does the answer is yes: what was asked for is bound when the first session is in,
//! before its command runs, or without one if none comes. If it then cannot be had, the person is told on the
//! session's standard error, as OpenSSH's client would tell them; without a session the connection ends, with the
//! reason.

use super::{
    agent::{PROMPTLY, Refused, clean, dial, kind_of},
    backend::Place,
    client::Client,
    forward::Announcements,
    limits::UserChannel,
};
use mlad::channel::{Connection, Frame, Open};
use rand::RngExt as _;
use std::{
    collections::HashMap,
    fmt,
    ops::RangeInclusive,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// Listeners of one connection.
const MAX_LISTENERS: usize = 64;
/// Time a connection has, after asking for a listener, to open the session that says which workspace is meant.
const SESSION_COMES: Duration = Duration::from_secs(2);
/// Ports given where no agent can be asked yet for a free one: dynamic ones (RFC 6335) above those that Linux gives
/// to outgoing connections, so that one is hardly ever taken.
const CHOSEN_PORTS: RangeInclusive<u32> = 61_000..=65_535;
/// Tries to find one among them that this connection does not have already.
const PORT_TRIES: usize = 64;

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

/// A listener that was promised and cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failed {
    listen: Listen,
    reason: String,
}

impl Failed {
    /// For a session's standard error, a line each: the first word for word what OpenSSH's client says.
    pub(super) fn lines(&self) -> [String; 2] {
        let Self { listen, reason } = self;
        [format!("Warning: {}", self.what()), format!("mlad: nothing listens on {listen} in the workspace: {reason}")]
    }

    fn what(&self) -> String {
        match &self.listen {
            Listen::Tcp { port, .. } => format!("remote port forwarding failed for listen port {port}"),
            Listen::Socket(path) => format!("remote port forwarding failed for listen path {}", clean(path)),
        }
    }
}

/// The listeners of a connection.
#[derive(Default)]
pub(super) struct Listeners(Mutex<State>);

#[derive(Default)]
struct State {
    all: HashMap<Listen, Listener>,
    /// What is to be told to the next session.
    failed: Vec<Failed>,
    /// Whether a task sees to what no session comes for.
    attended: bool,
}

enum Listener {
    /// Asked for before anybody was in the workspace.
    Pending,
    /// Being bound.
    Starting,
    /// Listens until it is cancelled.
    Listening(CancellationToken),
}

impl Listeners {
    /// Ends a listener; false if there is none.
    pub(super) fn cancel(&self, listen: &Listen) -> bool {
        match self.state().all.remove(listen) {
            Some(Listener::Listening(token)) => {
                token.cancel();
                true
            }
            Some(Listener::Pending | Listener::Starting) => true,
            None => false,
        }
    }

    /// Ends them all.
    pub(super) fn cancel_all(&self) {
        for listener in std::mem::take(&mut self.state().all).into_values() {
            if let Listener::Listening(token) = listener {
                token.cancel();
            }
        }
    }

    /// What could not be had and nobody was told yet.
    pub(super) fn take_failed(&self) -> Vec<Failed> {
        std::mem::take(&mut self.state().failed)
    }

    fn has_room_for(&self, listen: &Listen) -> bool {
        let state = self.state();
        state.all.len() < MAX_LISTENERS && !state.all.contains_key(listen)
    }

    /// A port that is probably free.
    fn choose_port(&self, address: &str) -> Option<u32> {
        let state = self.state();
        let taken = |port| state.all.contains_key(&Listen::Tcp { address: address.into(), port });
        (0..PORT_TRIES).map(|_| rand::rng().random_range(CHOSEN_PORTS)).find(|port| !taken(*port))
    }

    /// Puts one off; true if a task is to see to it.
    fn put_off(&self, listen: Listen) -> bool {
        let mut state = self.state();
        state.all.insert(listen, Listener::Pending);
        !std::mem::replace(&mut state.attended, true)
    }

    /// Whether something was put off. If not, the task that sees to that ends.
    fn is_put_off(&self) -> bool {
        let mut state = self.state();
        state.attended = state.all.values().any(|listener| matches!(listener, Listener::Pending));
        state.attended
    }

    /// What was put off is to be bound.
    fn begin(&self) -> Vec<Listen> {
        let mut state = self.state();
        let pending = state.all.iter_mut().filter(|(_, listener)| matches!(listener, Listener::Pending));
        pending
            .map(|(listen, listener)| {
                *listener = Listener::Starting;
                listen.clone()
            })
            .collect()
    }

    /// One was bound; false if the client does not want it any more.
    fn bound(&self, listen: &Listen, token: &CancellationToken) -> bool {
        let mut state = self.state();
        let wanted = state.all.get_mut(listen);
        if let Some(listener) = wanted {
            *listener = Listener::Listening(token.clone());
            return true;
        }
        false
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listens in the workspace for the client: the port it has, or is to have; none if it cannot be.
pub(super) async fn listen(client: &Arc<Client>, mut listen: Listen) -> Option<u32> {
    if !client.forwarding().remote {
        tracing::info!(%listen, "a listener was refused: this login may have none");
        return None;
    }
    if !client.listeners.has_room_for(&listen) {
        return None;
    }
    if let Some(place) = client.workplace.join_running().await {
        let bound = start_now(client, &*place, listen).await;
        return bound.inspect_err(|refused| tracing::info!(reason = refused.message, "a listener was refused")).ok();
    }
    let promised = match &mut listen {
        Listen::Tcp { address, port } => {
            if *port == 0 {
                *port = client.listeners.choose_port(address)?;
            }
            *port
        }
        Listen::Socket(_) => 0,
    };
    if client.listeners.put_off(listen) {
        let owner = Arc::clone(client);
        client.spawn(async move {
            tokio::select! {
                () = attend(&owner) => {}
                () = owner.lost.cancelled() => {}
            }
        });
    }
    Some(promised)
}

/// Does what was put off until somebody was in the workspace; returns what cannot be.
pub(super) async fn listen_pending(client: &Arc<Client>, place: &dyn Place) -> Vec<Failed> {
    let mut failed = client.listeners.take_failed();
    for listen in client.listeners.begin() {
        if let Err(Refused { message: reason, .. }) = start(client, place, listen.clone()).await {
            failed.extend(give_up(client, listen, reason));
        }
    }
    failed
}

/// Sees to what was put off and no session comes for.
async fn attend(client: &Arc<Client>) {
    loop {
        tokio::time::sleep(SESSION_COMES).await;
        // A session on its way in does it itself.
        client.workplace.settled().await;
        if !client.listeners.is_put_off() {
            return;
        }
        let failed = match client.workplace.join().await {
            Ok(place) => listen_pending(client, &*place).await,
            Err(refusal) => {
                let reason = refusal.lines.join("; ");
                let given_up = client.listeners.begin().into_iter();
                given_up.filter_map(|listen| give_up(client, listen, reason.clone())).collect()
            }
        };
        let reasons: Vec<_> = failed.iter().map(|failed| format!("{}: {}", failed.what(), failed.reason)).collect();
        if client.has_session() {
            // One that needs no workspace (sftp, say): the next that does is told.
            client.listeners.state().failed.extend(failed);
        } else if !reasons.is_empty() {
            client.dismiss(reasons.join("; "));
        }
    }
}

/// Nothing if the client does not want it any more.
fn give_up(client: &Client, listen: Listen, reason: String) -> Option<Failed> {
    tracing::info!(%listen, reason, "nothing listens in the workspace, though that was promised");
    client.listeners.cancel(&listen).then_some(Failed { listen, reason })
}

/// Binds what the client waits for.
async fn start_now(client: &Arc<Client>, place: &dyn Place, mut listen: Listen) -> Result<u32, Refused> {
    let (listener, bound) = bind(client, place, &listen).await?;
    if let Listen::Tcp { port, .. } = &mut listen
        && *port == 0
    {
        *port = bound;
    }
    client.listeners.state().all.insert(listen.clone(), Listener::Starting);
    serve(client, place, listen, listener);
    Ok(bound)
}

/// Binds what was put off.
async fn start(client: &Arc<Client>, place: &dyn Place, listen: Listen) -> Result<(), Refused> {
    let (listener, _) = bind(client, place, &listen).await?;
    serve(client, place, listen, listener);
    Ok(())
}

async fn bind(
    client: &Client,
    place: &dyn Place,
    listen: &Listen,
) -> Result<((Connection, UserChannel), u32), Refused> {
    let counted = client.count_channel().ok_or_else(|| Refused {
        reason: 4,
        message: format!("you have {} channels open, which is the limit", client.config.ssh.max_channels_per_user),
    })?;
    let open = match listen {
        Listen::Tcp { address, port } => Open::TcpipForward { address: address.clone(), port: *port },
        Listen::Socket(path) => Open::StreamlocalForward { path: path.clone() },
    };
    let (connection, bound) = dial(place, open, PROMPTLY).await?;
    Ok(((connection, counted), bound))
}

fn serve(client: &Arc<Client>, place: &dyn Place, listen: Listen, (connection, counted): (Connection, UserChannel)) {
    let token = client.lost.child_token();
    if !client.listeners.bound(&listen, &token) {
        return;
    }
    let announcements = Announcements::of_listener(client, place, listen.clone());
    let owner = Arc::clone(client);
    client.spawn(async move {
        tokio::select! {
            () = announce(connection, &announcements) => {
                owner.listeners.cancel(&listen);
            }
            () = token.cancelled() => {}
        }
        drop(counted);
    });
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

impl fmt::Display for Listen {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { address, port } if address.is_empty() => write!(formatter, "port {port}"),
            Self::Tcp { address, port } => write!(formatter, "{}:{port}", clean(address)),
            Self::Socket(path) => formatter.write_str(&clean(path)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(port: u32) -> Listen {
        Listen::Tcp { address: "localhost".into(), port }
    }

    #[test]
    fn what_is_put_off_is_bound_once_unless_it_is_cancelled() {
        let listeners = Listeners::default();
        assert!(listeners.put_off(tcp(1)), "a task is to see to it");
        assert!(!listeners.put_off(tcp(2)), "one is enough");
        assert!(listeners.is_put_off());
        assert_eq!((listeners.begin().len(), listeners.begin().len()), (2, 0));
        // While it was bound the client has thought better of it.
        assert!(listeners.cancel(&tcp(2)));
        let token = CancellationToken::new();
        assert!(listeners.bound(&tcp(1), &token) && !listeners.bound(&tcp(2), &token));
        assert!(!listeners.is_put_off() && listeners.put_off(tcp(3)), "the task has ended; the next begins anew");
        assert!(listeners.cancel(&tcp(1)) && token.is_cancelled() && !listeners.cancel(&tcp(1)));
    }

    #[test]
    fn a_connection_has_so_many_listeners_and_no_more() {
        let listeners = Listeners::default();
        for port in 0..MAX_LISTENERS as u32 {
            assert!(listeners.has_room_for(&tcp(port)));
            listeners.put_off(tcp(port));
            assert!(!listeners.has_room_for(&tcp(port)));
        }
        assert!(!listeners.has_room_for(&tcp(1000)));
    }

    #[test]
    fn chosen_ports_are_no_outgoing_connections() {
        let listeners = Listeners::default();
        for _ in 0..MAX_LISTENERS {
            let port = listeners.choose_port("localhost").unwrap();
            assert!(CHOSEN_PORTS.contains(&port) && listeners.has_room_for(&tcp(port)));
            listeners.put_off(tcp(port));
        }
    }

    #[test]
    fn failures_are_told_as_the_client_would_tell_them() {
        let failed = |listen| Failed { listen, reason: "it is taken".into() };
        assert_eq!(
            failed(tcp(8080)).lines(),
            [
                "Warning: remote port forwarding failed for listen port 8080",
                "mlad: nothing listens on localhost:8080 in the workspace: it is taken"
            ]
        );
        let socket = failed(Listen::Socket("/tmp/\x1b[2Js".into()));
        assert_eq!(socket.lines()[0], "Warning: remote port forwarding failed for listen path /tmp/[2Js");
    }
}
