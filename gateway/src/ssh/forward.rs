//! Forwarding: connections from the client into the workspace, and from the workspace to the client.

use super::{
    agent::{PROMPTLY, REACHING, Refused, dial},
    backend::Place,
    client::Client,
    inbox::Inbox,
    limits::UserChannel,
    listening::Listen,
    outlet::Outlet,
    pump::{Output, pump_in, pump_out},
};
use mlad::channel::{Open, Stream};
use russh::{
    Channel, ChannelOpenFailure,
    server::{ChannelOpenHandle, Msg},
};
use std::{sync::Arc, time::Duration};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// Announced connections of one listener or session on their way to the client at once.
const MAX_ANNOUNCED: usize = 32;
/// Time the last bytes of a closed channel have to be taken.
const DELIVERING: Duration = Duration::from_secs(60);
/// Time a client has to close a channel whose two ends it knows.
const CLIENT_CLOSES: Duration = Duration::from_secs(5);

/// Serves a channel into the workspace: opens it there first, and only then tells the client.
pub(super) async fn direct(
    client: Arc<Client>,
    channel: Channel<Msg>,
    (inbox, counted): (Arc<Inbox>, UserChannel),
    reply: ChannelOpenHandle,
    open: Open,
) {
    let outlet = client.outlet(channel, inbox, counted);
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
            client.forget_channel(outlet.id());
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
    let inbox = outlet.inbox();
    let target = stream.peer();
    let (reader, writer) = tokio::io::split(stream);
    let told = CancellationToken::new();
    let inward = async {
        tokio::select! {
            () = pump_in(inbox, writer) => {}
            () = async { inbox.ended().await; tokio::time::sleep(DELIVERING).await } => {}
        }
    };
    let outward = async {
        tokio::select! {
            sent = pump_out(reader, outlet, Output::Data) => if sent.is_ok() && outlet.eof().await.is_ok() {
                told.cancel();
            },
            _ = inbox.ended() => {}
        }
    };
    // The agent closes wholly when the target was reset: then there is nobody left to speak to.
    let lost = async {
        told.cancelled().await;
        match target.hang_up() {
            Ok(watch) => watch.wait().await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = async { tokio::join!(inward, outward) } => {
            // A channel that we close first is remembered by russh for the connection's life.
            if inbox.is_whole() {
                _ = tokio::time::timeout(CLIENT_CLOSES, inbox.ended()).await;
            }
        }
        () = lost => {}
    }
    outlet.close().await;
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
    /// Those of a listener.
    pub(super) fn of_listener(client: &Arc<Client>, place: &dyn Place, listen: Listen) -> Self {
        Self::new(client, place, Some(listen))
    }

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

    /// Somebody has connected to the listener.
    pub(super) fn listener(&self, ticket: u64, originator: String, port: u32) {
        self.bring(ticket, originator, port);
    }

    /// One that is too many or not allowed is left waiting, which the agent ends.
    fn bring(&self, ticket: u64, originator: String, port: u32) {
        let Ok(permit) = Arc::clone(&self.room).try_acquire_owned() else { return };
        let forwarding = self.client.forwarding();
        let permitted = if self.listen.is_none() { forwarding.agent } else { forwarding.remote };
        if !self.allowed || !permitted || !self.client.has_room() {
            return;
        }
        let Some(counted) = self.client.count_channel() else { return };
        let (client, place) = (Arc::clone(&self.client), Arc::clone(&self.place));
        let arrival = Arrival { listen: self.listen.clone(), ticket, originator, port };
        self.client.spawn(async move {
            tokio::select! {
                () = bring(&client, &*place, arrival, permit, counted) => {}
                () = client.lost.cancelled() => {}
            }
        });
    }
}

/// Somebody who waits in the workspace to be brought to the client.
struct Arrival {
    listen: Option<Listen>,
    ticket: u64,
    originator: String,
    port: u32,
}

async fn bring(
    client: &Client,
    place: &dyn Place,
    arrival: Arrival,
    permit: OwnedSemaphorePermit,
    counted: UserChannel,
) {
    let Arrival { listen, ticket, originator, port } = arrival;
    let handle = &client.handle;
    let opened = match listen {
        None => handle.channel_open_agent().await,
        Some(Listen::Tcp { address, port: bound }) => {
            handle.channel_open_forwarded_tcpip(address, bound, originator, port).await
        }
        Some(Listen::Socket(path)) => handle.channel_open_forwarded_streamlocal(path).await,
    };
    // Before anything is waited for: as long as the channel's read half is there, what the client says goes into
    // it, and stops the whole connection when it is full (see `flow`).
    let outlet = opened.ok().map(|channel| {
        let inbox = client.take_inbox(channel.id());
        client.outlet(channel, inbox, counted)
    });
    // Taken in any case: one that the client refused ends at once, instead of waiting.
    let taken = dial(place, Open::Accept { ticket }, PROMPTLY).await;
    drop(permit);
    let Some(outlet) = outlet else { return };
    match taken {
        Ok((connection, _)) => bridge(connection.into_stream(), &outlet).await,
        Err(_) => outlet.close().await,
    }
    client.finish_channel(outlet.id());
}
