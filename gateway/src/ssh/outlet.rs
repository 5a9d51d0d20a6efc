//! What goes to the client on one channel.

use super::{inbox::Inbox, limits::UserChannel};
use bytes::Bytes;
use mlad::channel::Exit;
use russh::{
    ChannelId, ChannelWriteHalf, Sig,
    server::{Handle, Msg},
};
use std::sync::Arc;

/// Kind of extended data: standard error.
const STDERR: u32 = 1;

/// The channel is over; nothing more can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Gone;

/// The sending side of a channel. Waits while the client takes nothing, until the channel is over.
pub(super) struct Outlet {
    half: ChannelWriteHalf<Msg>,
    handle: Handle,
    inbox: Arc<Inbox>,
    /// Counts among the user's channels for as long as this is being served, also when the client has closed it.
    _counted: UserChannel,
}

impl Outlet {
    pub(super) fn new(half: ChannelWriteHalf<Msg>, handle: Handle, inbox: Arc<Inbox>, counted: UserChannel) -> Self {
        Self { half, handle, inbox, _counted: counted }
    }

    /// The channel's number.
    pub(super) fn id(&self) -> ChannelId {
        self.half.id()
    }

    /// What the client sends.
    pub(super) fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// Answers the request that is open on this channel, if the client has asked for an answer.
    pub(super) async fn answer(&self, yes: bool) -> Result<(), Gone> {
        let id = self.id();
        if yes {
            self.unless_over(self.handle.channel_success(id)).await
        } else {
            self.unless_over(self.handle.channel_failure(id)).await
        }
    }

    /// Sends data, or standard output.
    pub(super) async fn data(&self, bytes: Bytes) -> Result<(), Gone> {
        self.unless_over(self.half.data_bytes(bytes)).await
    }

    /// Sends standard error.
    pub(super) async fn error(&self, bytes: impl Into<Bytes>) -> Result<(), Gone> {
        self.unless_over(self.half.extended_data_bytes(STDERR, bytes)).await
    }

    /// No more data will follow.
    pub(super) async fn eof(&self) -> Result<(), Gone> {
        self.unless_over(self.half.eof()).await
    }

    /// How the process ended.
    pub(super) async fn exit(&self, exit: &Exit) -> Result<(), Gone> {
        match exit {
            Exit::Status(status) => self.unless_over(self.half.exit_status(*status)).await,
            Exit::Signal { name, core_dumped, message } => {
                let signal = Sig::Custom(name.clone());
                let id = self.id();
                let sent = self.handle.exit_signal_request(id, signal, *core_dumped, message.clone(), String::new());
                self.unless_over(sent).await
            }
        }
    }

    /// Closes the channel.
    pub(super) async fn close(&self) {
        _ = self.unless_over(self.half.close()).await;
    }

    /// Ends a session with an exit status and nothing more.
    pub(super) async fn finish(&self, exit: &Exit) -> Result<(), Gone> {
        self.eof().await?;
        self.exit(exit).await?;
        self.close().await;
        Ok(())
    }

    async fn unless_over<E>(&self, sent: impl Future<Output = Result<(), E>>) -> Result<(), Gone> {
        tokio::select! {
            biased;
            _ = self.inbox.ended() => Err(Gone),
            sent = sent => sent.map_err(|_| Gone),
        }
    }
}
