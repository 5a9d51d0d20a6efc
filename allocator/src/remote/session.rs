//! One connection of a daemon to the allocator.

use super::{
    daemon::DaemonSettings,
    desk::Desk,
    lease_clock::{LeaseClock, now},
    wire::{Frames, FromNode, Hello, Task, ToNode, frames, receive, send},
};
use crate::AllocatorError;
use rustls::pki_types::ServerName;
use std::{collections::VecDeque, io, sync::Arc, time::Duration};
use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// How long connecting and saying hello may take, each.
const CONNECT: Duration = Duration::from_secs(10);
/// Renewals that may be on their way.
const RENEWALS: usize = 64;

/// Why a connection ended, or came to nothing.
#[derive(Debug)]
pub(super) enum End {
    /// What the daemon was told; it may come back once it has ended what runs.
    StopFirst(String),
    /// What the daemon was told.
    Refused(String),
    /// The connection failed.
    Failed(String),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<AllocatorError> for End {
    fn from(error: AllocatorError) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Connects, joins, and obeys until the connection ends. Can be cut off at any point.
pub(super) async fn session(settings: &DaemonSettings, hello: Hello, desk: &Desk, clock: &LeaseClock) -> End {
    let end = match begin(settings, hello, clock).await {
        Ok((frames, lease)) => obey(frames, lease, desk, clock).await,
        Err(end) => end,
    };
    desk.leave();
    end
}

async fn begin(
    settings: &DaemonSettings,
    hello: Hello,
    clock: &LeaseClock,
) -> Result<(Frames<TlsStream<TcpStream>>, Duration), End> {
    let late = |_| End::Failed("it does not answer in time".to_owned());
    let host = settings.allocator.rsplit_once(':').map_or(settings.allocator.as_str(), |(host, _)| host);
    let host = settings.server_name.as_deref().unwrap_or_else(|| host.trim_matches(['[', ']']));
    let name = ServerName::try_from(host.to_owned()).map_err(|error| End::Failed(format!("`{host}`: {error}")))?;
    let config = settings.credentials.client()?;
    let connect = async {
        let stream = TcpStream::connect(&settings.allocator).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    };
    let mut frames = frames(timeout(CONNECT, connect).await.map_err(late)??);
    // From before it is sent: it can arrive no sooner, and so the lease ends here no later than there.
    let said = now();
    send(&mut frames, &FromNode::Hello(hello)).await?;
    match timeout(CONNECT, receive(&mut frames)).await.map_err(late)?? {
        ToNode::Welcome { fence, lease_ms } => {
            let lease = Duration::from_millis(lease_ms).max(Duration::from_secs(1));
            clock.extend(said + lease)?;
            tracing::info!(allocator = settings.allocator, fence, ?lease, "joined");
            Ok((frames, lease))
        }
        ToNode::Refused { reason, stop_first: true } => Err(End::StopFirst(reason)),
        ToNode::Refused { reason, stop_first: false } => Err(End::Refused(reason)),
        other => Err(End::Failed(format!("it answers with something else: {other:?}"))),
    }
}

async fn obey(mut frames: Frames<TlsStream<TcpStream>>, lease: Duration, desk: &Desk, clock: &LeaseClock) -> End {
    let mut reports: mpsc::Receiver<_> = desk.listen();
    let mut renewals: VecDeque<(u64, Duration)> = VecDeque::new();
    let mut number = 0;
    let mut renew = interval(lease / 3);
    renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let sent = tokio::select! {
            _ = renew.tick() => {
                number += 1;
                if renewals.len() >= RENEWALS {
                    renewals.pop_front();
                }
                renewals.push_back((number, now()));
                send(&mut frames, &FromNode::Renew(number)).await
            }
            report = reports.recv() => match report {
                Some(report) => send(&mut frames, &FromNode::Report(report)).await,
                None => return End::Failed("the GPUs' threads ended".to_owned()),
            },
            told = receive(&mut frames) => match told {
                Ok(ToNode::Renewed(answered)) => renewed(&mut renewals, answered, lease, clock),
                Ok(ToNode::Order { gpu, task: Task::Read }) => {
                    desk.read(&gpu);
                    Ok(())
                }
                Ok(ToNode::Order { gpu, task: Task::Change(change) }) => match desk.change(&gpu, change) {
                    Some(refusal) => send(&mut frames, &FromNode::Report(refusal)).await,
                    None => Ok(()),
                },
                Ok(ToNode::Refused { reason, stop_first: true }) => return End::StopFirst(reason),
                Ok(ToNode::Refused { reason, stop_first: false }) => return End::Refused(reason),
                Ok(ToNode::Welcome { .. }) => return End::Failed("it says welcome twice".to_owned()),
                Err(error) => Err(error),
            },
        };
        if let Err(error) = sent {
            return error.into();
        }
    }
}

/// The lease lasts from when the renewal that is answered was sent.
fn renewed(
    renewals: &mut VecDeque<(u64, Duration)>,
    answered: u64,
    lease: Duration,
    clock: &LeaseClock,
) -> io::Result<()> {
    while let Some((number, sent)) = renewals.pop_front_if(|(number, _)| *number <= answered) {
        if number == answered {
            clock.extend(sent + lease)?;
        }
    }
    Ok(())
}
