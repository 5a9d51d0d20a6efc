//! A connection that has logged in: what its callbacks and the tasks of its channels share.

use super::{
    auth::{Credential, Login},
    backend::Backend,
    flow::Meter,
    grant::Grant,
    inbox::{End, Inbox},
    limits::{UserChannel, UserConnection},
    listening::Listeners,
    outlet::Outlet,
    workplace::Workplace,
};
use crate::config::Config;
use mlad::api::Forwarding;
use russh::{
    Channel, ChannelId,
    server::{Handle, Msg},
};
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{Instrument as _, Span};

/// Channels of a connection that russh remembers before no more can be opened. russh 0.65.1 drops what it has of a
/// channel when the client's close comes while the channel is open (`Session::channels`, in `server/encrypted.rs`);
/// of one that we closed first it ignores the client's close, and keeps about 3 KiB until the connection ends.
const MAX_REMEMBERED: usize = 16 * 1024;
/// The same for all connections of a user.
const MAX_REMEMBERED_OF_USER: usize = 64 * 1024;

/// The connection.
pub(super) struct Client {
    pub(super) config: Arc<Config>,
    pub(super) handle: Handle,
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    /// What let them in.
    pub(super) credential: Credential,
    /// What that allows.
    pub(super) grant: Grant,
    /// What they and their projects may forward, which can change.
    policy: Mutex<Forwarding>,
    pub(super) workplace: Workplace,
    pub(super) meter: Arc<Meter>,
    /// What listens in the workspace for this connection.
    pub(super) listeners: Listeners,
    /// Cancelled when the connection is gone.
    pub(super) lost: CancellationToken,
    /// Why the connection is to end, once it is.
    dismissal: watch::Sender<Option<String>>,
    channels: Mutex<Channels>,
    tasks: TaskTracker,
    pub(super) span: Span,
    /// Counts among the user's connections.
    slot: UserConnection,
}

#[derive(Default)]
struct Channels {
    open: HashMap<ChannelId, Entry>,
    /// How many russh remembers that are closed.
    remembered: usize,
}

struct Entry {
    inbox: Arc<Inbox>,
    kind: Kind,
    /// Whether the task that opened this channel has yet to come for it.
    awaited: bool,
}

/// What a channel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A session, which has a standard error.
    Session,
    /// The bytes of a forwarded connection.
    Forwarded,
}

impl Channels {
    fn entry(&mut self, id: ChannelId, meter: &Arc<Meter>, awaited: bool) -> &mut Entry {
        self.open.entry(id).or_insert_with(|| Entry {
            inbox: Inbox::new(Arc::clone(meter)),
            kind: Kind::Forwarded,
            awaited,
        })
    }

    /// The client has closed a channel; its queue. One whose task has yet to come waits for that.
    fn closed(&mut self, id: ChannelId) -> Option<Arc<Inbox>> {
        let entry = self.open.get(&id)?;
        if entry.awaited { Some(Arc::clone(&entry.inbox)) } else { self.open.remove(&id).map(|entry| entry.inbox) }
    }

    /// A channel has been served to its end: its queue, and whether russh remembers it, if it was still here.
    fn finish(&mut self, id: ChannelId) -> Option<(Arc<Inbox>, bool)> {
        let inbox = self.open.remove(&id)?.inbox;
        let remembered = !inbox.is_over();
        self.remembered += usize::from(remembered);
        Some((inbox, remembered))
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
        let Login { user, workspace, credential, grant, policy, slot } = login;
        Arc::new(Self {
            config,
            handle,
            peer: ends.peer,
            local: ends.local,
            credential,
            grant,
            policy: Mutex::new(policy),
            workplace: Workplace::new(backend, user, workspace),
            meter,
            listeners: Listeners::default(),
            lost: CancellationToken::new(),
            dismissal: watch::Sender::default(),
            channels: Mutex::default(),
            tasks: TaskTracker::new(),
            span,
            slot,
        })
    }

    /// Whether one more channel may be opened on this connection.
    pub(super) fn has_room(&self) -> bool {
        let channels = self.channels();
        channels.open.len() < self.config.ssh.max_channels
            && channels.remembered < MAX_REMEMBERED
            && self.slot.share().remembered.load(Ordering::Relaxed) < MAX_REMEMBERED_OF_USER
            && !self.meter.is_full()
    }

    /// What may be forwarded now.
    pub(super) fn forwarding(&self) -> Forwarding {
        self.grant.forwarding.and(*self.policy.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// They and their projects may forward something else from now on. What listens and may not any more ends.
    pub(super) fn set_policy(&self, policy: Forwarding) {
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner) = policy;
        if !self.forwarding().remote {
            self.listeners.cancel_all();
        }
    }

    /// Counts a channel or listener among the user's; none if they have as many as they may.
    pub(super) fn count_channel(&self) -> Option<UserChannel> {
        self.slot.share().channel(self.config.ssh.max_channels_per_user)
    }

    /// A queue for a channel that the client is opening; none if it may not.
    pub(super) fn add_channel(&self, id: ChannelId, kind: Kind) -> Option<(Arc<Inbox>, UserChannel)> {
        let counted = self.has_room().then(|| self.count_channel())??;
        let mut channels = self.channels();
        let entry = channels.entry(id, &self.meter, false);
        entry.kind = kind;
        Some((Arc::clone(&entry.inbox), counted))
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

    /// Whether the person has a session open, where they can be told something.
    pub(super) fn has_session(&self) -> bool {
        self.channels().open.values().any(|entry| entry.kind == Kind::Session)
    }

    /// The client has closed a channel; the task that serves it sees its end.
    pub(super) fn channel_closed(&self, id: ChannelId) {
        let closed = self.channels().closed(id);
        if let Some(inbox) = closed {
            inbox.end(End::Closed);
        }
    }

    /// A channel was never opened.
    pub(super) fn forget_channel(&self, id: ChannelId) {
        let forgotten = self.channels().open.remove(&id);
        if let Some(entry) = forgotten {
            entry.inbox.end(End::Closed);
        }
    }

    /// A channel has been served to its end, and closed if the client had not done so.
    pub(super) fn finish_channel(&self, id: ChannelId) {
        let finished = self.channels().finish(id);
        if let Some((inbox, remembered)) = finished {
            self.slot.share().remembered.fetch_add(usize::from(remembered), Ordering::Relaxed);
            inbox.end(End::Closed);
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

    /// Ends the connection; the person is told why.
    pub(super) fn dismiss(&self, reason: impl Into<String>) {
        self.dismissal.send_if_modified(|known| {
            let new = known.is_none();
            known.get_or_insert_with(|| reason.into());
            new
        });
    }

    /// Returns, with the reason, when the connection is to end.
    pub(super) async fn dismissed(&self) -> String {
        // The sender lives as long as `self`.
        let reason = self.dismissal.subscribe().wait_for(Option::is_some).await.map(|reason| reason.clone());
        reason.ok().flatten().unwrap_or_default()
    }

    /// The sending side of a channel. The read half is dropped: see [`flow`](super::flow).
    pub(super) fn outlet(&self, channel: Channel<Msg>, inbox: Arc<Inbox>, counted: UserChannel) -> Outlet {
        let (_, half) = channel.split();
        Outlet::new(half, self.handle.clone(), inbox, counted)
    }

    /// Runs the task that serves a channel, and forgets the channel when it is over. It sees by itself when
    /// the channel or the connection ends.
    pub(super) fn spawn_channel(self: &Arc<Self>, id: ChannelId, task: impl Future<Output = ()> + Send + 'static) {
        let client = Arc::clone(self);
        self.spawn(async move {
            task.await;
            client.finish_channel(id);
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

impl Drop for Client {
    fn drop(&mut self) {
        let remembered = self.channels().remembered;
        self.slot.share().remembered.fetch_sub(remembered, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use russh::keys::ssh_key::encoding::Decode as _;

    fn id(number: u8) -> ChannelId {
        ChannelId::decode(&mut &[0, 0, 0, number][..]).unwrap()
    }

    #[test]
    fn only_channels_that_we_close_first_are_remembered() {
        let (mut channels, meter) = (Channels::default(), Meter::new(Arc::default(), Arc::default()));
        // As with `-D`: the client closes, and its task sees that.
        for number in 0..100 {
            channels.entry(id(number), &meter, false);
            channels.closed(id(number)).unwrap().end(End::Closed);
            assert!(channels.finish(id(number)).is_none());
        }
        // One that we have opened can be closed before its task comes for it.
        channels.entry(id(1), &meter, true);
        channels.closed(id(1)).unwrap().end(End::Closed);
        channels.entry(id(1), &meter, true).awaited = false;
        assert!(channels.finish(id(1)).is_some());
        assert_eq!((channels.remembered, channels.open.len()), (0, 0));
        // As with sessions: the process has ended, and so the channel.
        channels.entry(id(2), &meter, false);
        assert!(channels.finish(id(2)).is_some());
        assert!(channels.closed(id(2)).is_none());
        assert_eq!((channels.remembered, channels.open.len()), (1, 0));
    }
}
