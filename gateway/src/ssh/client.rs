//! A connection that has logged in: what its callbacks and the tasks of its channels share.

use super::{
    auth::Login,
    backend::Backend,
    flow::Meter,
    forward::Listeners,
    inbox::{End, Inbox},
    limits::UserConnection,
    outlet::Outlet,
    workplace::Workplace,
};
use crate::config::Config;
use russh::{
    Channel, ChannelId,
    server::{Handle, Msg},
};
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, Span};

/// Channels a connection may open in its whole life. russh 0.65.1 keeps about 3 KiB of each that the server
/// closes first, until the connection ends.
const MAX_CHANNELS_EVER: usize = 16 * 1024;

/// The connection.
pub(super) struct Client {
    pub(super) config: Arc<Config>,
    pub(super) handle: Handle,
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    pub(super) workplace: Workplace,
    pub(super) meter: Arc<Meter>,
    /// What listens in the workspace for this connection.
    pub(super) listeners: Listeners,
    /// Cancelled when the connection is gone.
    pub(super) lost: CancellationToken,
    channels: Mutex<Channels>,
    tasks: TaskTracker,
    span: Span,
    /// Counts among the user's connections.
    _slot: UserConnection,
}

#[derive(Default)]
struct Channels {
    open: HashMap<ChannelId, Entry>,
    ever: usize,
}

struct Entry {
    inbox: Arc<Inbox>,
    /// Whether the task that opened this channel has yet to come for it.
    awaited: bool,
}

impl Channels {
    fn entry(&mut self, id: ChannelId, meter: &Arc<Meter>, awaited: bool) -> &mut Entry {
        self.open.entry(id).or_insert_with(|| {
            self.ever += 1;
            Entry { inbox: Inbox::new(Arc::clone(meter)), awaited }
        })
    }
}

/// From where to where a connection goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
}

impl Client {
    pub(super) fn new(
        config: Arc<Config>,
        backend: Arc<dyn Backend>,
        login: Login,
        handle: Handle,
        ends: Ends,
        meter: Arc<Meter>,
        span: Span,
    ) -> Arc<Self> {
        let Login { user, workspace, fingerprint: _, slot } = login;
        Arc::new(Self {
            config,
            handle,
            peer: ends.peer,
            local: ends.local,
            workplace: Workplace::new(backend, user, workspace),
            meter,
            listeners: Listeners::default(),
            lost: CancellationToken::new(),
            channels: Mutex::default(),
            tasks: TaskTracker::new(),
            span,
            _slot: slot,
        })
    }

    /// Whether one more channel may be opened.
    pub(super) fn has_room(&self) -> bool {
        let channels = self.channels();
        channels.open.len() < self.config.ssh.max_channels && channels.ever < MAX_CHANNELS_EVER && !self.meter.is_full()
    }

    /// A queue for a channel that the client is opening.
    pub(super) fn add_inbox(&self, id: ChannelId) -> Arc<Inbox> {
        Arc::clone(&self.channels().entry(id, &self.meter, false).inbox)
    }

    /// The client has taken a channel that a task of ours opens. Its data can come before the task does.
    pub(super) fn await_task(&self, id: ChannelId) {
        self.channels().entry(id, &self.meter, true);
    }

    /// The queue of a channel, for the task that has opened it; it may have ended already. (The task can also
    /// be here before the callback that calls [`Self::await_task`].)
    pub(super) fn take_inbox(&self, id: ChannelId) -> Arc<Inbox> {
        let mut channels = self.channels();
        let entry = channels.entry(id, &self.meter, false);
        entry.awaited = false;
        Arc::clone(&entry.inbox)
    }

    /// The queue of a channel.
    pub(super) fn inbox(&self, id: ChannelId) -> Option<Arc<Inbox>> {
        self.channels().open.get(&id).map(|entry| Arc::clone(&entry.inbox))
    }

    /// Forgets a channel; the task that serves it sees its end.
    pub(super) fn end_channel(&self, id: ChannelId, end: End) {
        let mut channels = self.channels();
        let inbox = channels.open.get(&id).map(|entry| Arc::clone(&entry.inbox));
        channels.open.retain(|other, entry| *other != id || entry.awaited);
        drop(channels);
        if let Some(inbox) = inbox {
            inbox.end(end);
        }
    }

    /// The connection is gone, and with it every channel.
    pub(super) fn end_all(&self) {
        let open = std::mem::take(&mut self.channels().open);
        for entry in open.into_values() {
            entry.inbox.end(End::Lost);
        }
        self.lost.cancel();
        self.tasks.close();
    }

    /// The sending side of a channel. The read half is dropped: see [`flow`](super::flow).
    pub(super) fn outlet(&self, channel: Channel<Msg>, inbox: Arc<Inbox>) -> Outlet {
        let (_, half) = channel.split();
        Outlet::new(half, self.handle.clone(), inbox)
    }

    /// Runs the task that serves a channel, and forgets the channel when it is over. It sees by itself when
    /// the channel or the connection ends.
    pub(super) fn spawn_channel(self: &Arc<Self>, id: ChannelId, task: impl Future<Output = ()> + Send + 'static) {
        let client = Arc::clone(self);
        self.spawn(async move {
            task.await;
            client.end_channel(id, End::Closed);
        });
    }

    /// Runs a task of this connection. It ends with the connection at the latest.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(task.instrument(self.span.clone()));
    }

    /// Returns when every task of the connection has ended.
    pub(super) async fn finished(&self) {
        self.tasks.wait().await;
    }

    fn channels(&self) -> MutexGuard<'_, Channels> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
