//! The allocator's side: accepts the daemons of nodes, and hands what they say to the task that owns the ledger.

use super::{
    identity::{Credentials, is_for, is_node_name},
    wire::{self, Frames, FromNode, Hello, ToNode, VERSION, checked, frames, is_identifier, receive, send},
};
use crate::{
    AllocatorError,
    lease::{Joining, Unwelcome},
    node::Report,
};
use rustls::pki_types::CertificateDer;
use std::{collections::BTreeSet, io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, oneshot},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

/// How daemons of other machines are heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSettings {
    /// Where they connect to.
    pub listen: SocketAddr,
    /// Who we are, and whose certificates count.
    pub credentials: Credentials,
    /// The nodes that may join; empty for all that the authority signed for.
    pub allow: BTreeSet<String>,
    /// How long a node's lease lasts unless it is renewed.
    pub lease: Duration,
}

/// What the ledger's task hears of nodes.
#[derive(Debug)]
pub(crate) enum NodeEvent {
    /// A daemon wants to join. What it is to be told goes to `outbox`.
    Join {
        /// Who.
        joining: Joining,
        /// What it is told.
        outbox: mpsc::Sender<ToNode>,
        /// Its fence, or why not.
        reply: oneshot::Sender<Result<u64, Unwelcome>>,
    },
    /// It renews its lease.
    Renew {
        /// The node.
        node: String,
        /// Under which it joined.
        fence: u64,
        /// Whether it holds it.
        reply: oneshot::Sender<bool>,
    },
    /// It reports of its GPUs.
    Report {
        /// The node.
        node: String,
        /// Under which it joined.
        fence: u64,
        /// What.
        report: Report,
    },
    /// Its connection ended.
    Leave {
        /// The node.
        node: String,
        /// Under which it joined.
        fence: u64,
    },
}

/// The most connections that have not said who they are.
const STRANGERS: usize = 64;
/// The most connections.
const CONNECTIONS: usize = 8192;
/// How long one may take to say who it is.
const INTRODUCTION: Duration = Duration::from_secs(10);
/// Orders that may wait to be sent to a node.
const ORDERS: usize = 1024;

/// Hears daemons, until it is dropped or stopped.
#[derive(Debug)]
pub(crate) struct Hub {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    task: JoinHandle<()>,
}

impl Hub {
    /// Begins to listen.
    ///
    /// # Errors
    /// [`AllocatorError::Settings`] when that cannot be, or the certificates are no good.
    pub(crate) async fn start(
        settings: NodeSettings,
        events: mpsc::Sender<NodeEvent>,
        stop: CancellationToken,
    ) -> Result<Self, AllocatorError> {
        settings.credentials.server()?;
        let wrong =
            |error: io::Error| AllocatorError::Settings(format!("cannot listen on {}: {error}", settings.listen));
        let listener = TcpListener::bind(settings.listen).await.map_err(wrong)?;
        let address = listener.local_addr().map_err(wrong)?;
        tracing::info!(%address, "nodes can join");
        let shared = Arc::new(Shared { settings, events, strangers: Semaphore::new(STRANGERS) });
        Ok(Self { address, task: tokio::spawn(accept(listener, shared, stop)) })
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Shared {
    settings: NodeSettings,
    events: mpsc::Sender<NodeEvent>,
    strangers: Semaphore,
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept(), if connections.len() < CONNECTIONS => accepted,
            _ = connections.join_next(), if connections.len() >= CONNECTIONS => continue,
        };
        match accepted {
            Ok((stream, from)) => {
                connections.spawn(connection(stream, from, Arc::clone(&shared), stop.clone()));
            }
            Err(error) => {
                // Out of descriptors, most likely: it passes when connections end.
                tracing::warn!(%error, "cannot accept a node's connection");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    while connections.join_next().await.is_some() {}
}

async fn connection(stream: TcpStream, from: SocketAddr, shared: Arc<Shared>, stop: CancellationToken) {
    let introduced = {
        // Whoever comes while there are too many waits for a place; the time is what bounds it.
        let introduce = async {
            let _permit = shared.strangers.acquire().await.map_err(io::Error::other)?;
            introduction(stream, &shared).await
        };
        tokio::select! {
            () = stop.cancelled() => return,
            introduced = timeout(INTRODUCTION, introduce) => introduced,
        }
    };
    let (mut frames, hello) = match introduced {
        Ok(Ok(introduced)) => introduced,
        Ok(Err(error)) => return tracing::warn!(%from, %error, "somebody who is no node was turned away"),
        Err(_) => return tracing::warn!(%from, "somebody did not say who they are in time"),
    };
    let node = hello.node.clone();
    match shared.join(hello).await {
        Ok((fence, orders)) => {
            let why = talk(&mut frames, &shared, (&node, fence), orders, &stop).await;
            if let Err(error) = why {
                tracing::warn!(node, fence, %from, %error, "a node's connection ended");
            }
            // Without the ledger's task nobody wants to know.
            drop(shared.events.send(NodeEvent::Leave { node, fence }).await);
        }
        Err(Unwelcome { reason, stop_first }) => {
            tracing::warn!(node, %from, reason, "a node may not join");
            drop(send(&mut frames, &ToNode::Refused { reason, stop_first }).await);
        }
    }
}

/// Hears who connects, and that a certificate says so.
async fn introduction(stream: TcpStream, shared: &Shared) -> io::Result<(Frames<TlsStream<TcpStream>>, Hello)> {
    stream.set_nodelay(true)?;
    // Read anew each time: certificates are replaced before they run out.
    let config = shared.settings.credentials.server().map_err(io::Error::other)?;
    let tls = TlsAcceptor::from(Arc::new(config)).accept(stream).await?;
    let certificate = tls.get_ref().1.peer_certificates().and_then(<[_]>::first).cloned();
    let certificate = certificate.ok_or_else(|| io::Error::other("it shows no certificate"))?;
    let mut frames = frames(tls);
    let FromNode::Hello(hello) = receive(&mut frames).await? else {
        return Err(io::Error::other("it does not say who it is"));
    };
    if let Err(reason) = shared.settings.admits(&hello, &certificate) {
        send(&mut frames, &ToNode::Refused { reason: reason.clone(), stop_first: false }).await?;
        return Err(io::Error::other(reason));
    }
    Ok((frames, hello))
}

impl NodeSettings {
    fn admits(&self, hello: &Hello, certificate: &CertificateDer<'_>) -> Result<(), String> {
        let Hello { version, node, machine, boot, .. } = hello;
        if *version != VERSION {
            return Err(format!("it speaks version {version} of the protocol, and the allocator version {VERSION}"));
        }
        if !is_node_name(node) || !is_identifier(machine) || !is_identifier(boot) {
            return Err("it names itself in a way that cannot be".to_owned());
        }
        if !is_for(certificate, node) {
            return Err(format!("its certificate is not for {node}"));
        }
        match self.allow.is_empty() || self.allow.contains(node) {
            true => Ok(()),
            false => Err(format!("{node} is not among the nodes that may join")),
        }
    }
}

impl Shared {
    async fn join(&self, hello: Hello) -> Result<(u64, mpsc::Receiver<ToNode>), Unwelcome> {
        let gone = || Unwelcome { reason: "the allocator is being stopped".to_owned(), stop_first: false };
        let Hello { node, machine, boot, stopped, .. } = hello;
        let (outbox, orders) = mpsc::channel(ORDERS);
        let (reply, answer) = oneshot::channel();
        let joining = Joining { node, machine, boot, stopped };
        self.events.send(NodeEvent::Join { joining, outbox, reply }).await.map_err(|_| gone())?;
        let fence = answer.await.map_err(|_| gone())??;
        Ok((fence, orders))
    }

    async fn renew(&self, node: &str, fence: u64) -> bool {
        let (reply, answer) = oneshot::channel();
        let event = NodeEvent::Renew { node: node.to_owned(), fence, reply };
        self.events.send(event).await.is_ok() && answer.await.unwrap_or(false)
    }
}

/// Until the connection ends, another takes its place, or the allocator stops.
async fn talk(
    frames: &mut Frames<TlsStream<TcpStream>>,
    shared: &Shared,
    (node, fence): (&str, u64),
    mut orders: mpsc::Receiver<ToNode>,
    stop: &CancellationToken,
) -> io::Result<()> {
    let lease = shared.settings.lease;
    let lease_ms = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
    send(frames, &ToNode::Welcome { fence, lease_ms }).await?;
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = sleep_until(heard + lease) => return Err(io::ErrorKind::TimedOut.into()),
            order = orders.recv() => match order {
                Some(order) => send(frames, &order).await?,
                None => return Err(io::Error::other("another connection of the node took its place")),
            },
            said = receive(frames) => {
                heard = Instant::now();
                match said? {
                    FromNode::Renew(number) if shared.renew(node, fence).await => {
                        send(frames, &ToNode::Renewed(number)).await?;
                    }
                    FromNode::Renew(_) => {
                        let reason = "the node's lease ran out".to_owned();
                        send(frames, &ToNode::Refused { reason, stop_first: true }).await?;
                        return Err(io::Error::other("its lease ran out"));
                    }
                    FromNode::Report(report) => {
                        let report = checked(report).map_err(io::Error::other)?;
                        let event = NodeEvent::Report { node: node.to_owned(), fence, report };
                        shared.events.send(event).await.map_err(io::Error::other)?;
                    }
                    FromNode::Hello(_) => return Err(io::Error::other("it says twice who it is")),
                }
            }
        }
    }
}

/// What an order is on the wire; none for one that never leaves its machine.
pub(crate) fn order(gpu: String, order: &crate::node::Order) -> Option<ToNode> {
    let task = match order {
        crate::node::Order::Read => wire::Task::Read,
        crate::node::Order::Change(change) => wire::Task::Change(change.clone()),
        crate::node::Order::Clear(_) => return None,
    };
    Some(ToNode::Order { gpu, task })
}

/// Why a daemon may not join while that cannot be written down.
pub(crate) fn unwritten(error: &AllocatorError) -> Unwelcome {
    Unwelcome { reason: format!("the allocator cannot write it down: {error}"), stop_first: false }
}
