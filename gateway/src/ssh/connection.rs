//! One connection from its first byte to its last: identification, login grace time, the session, the end.

use super::{
    algorithms::{IDENTIFICATION, Transport},
    auth::{Credential, Login, expired, revoked},
    backend::Backend,
    callbacks::Callbacks,
    certificate::Certified,
    client::{Client, Ends},
    flow::Meter,
    limits::{CodeTries, Counted, SourceSlot, UserConnections},
    penalties::Offence,
};
use crate::{
    config::Config,
    store::{Store, StoreError, UserRecord},
};
use bytes::{Buf as _, Bytes};
use jiff::Timestamp;
use russh::{
    Disconnect,
    server::{Handle, run_stream},
};
use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader, ReadBuf},
    net::TcpStream,
    sync::{oneshot, watch},
    time::Instant,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tracing::Span;

/// Bytes read from a socket at once. Large ones save 10 to 17 % of the CPU time of an upload; what is not
/// used costs no memory.
const READ_BUFFER: usize = 256 * 1024;
/// Longest identification of a client, in bytes (RFC 4253 section 4.2).
const MAX_IDENTIFICATION: u64 = 255;
/// Time running sessions have to come to their end when the server stops.
pub(super) const DRAIN: Duration = Duration::from_secs(10);
/// Time a client has to take the last words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Last words to those who are still there when the server stops.
const RESTART: &str = "the server is being restarted; your workspace and your jobs go on, log in again in a moment";
/// Time until it is asked again whether somebody may still be here, if the database does not say.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Time until the clock is looked at again, when something ends at a time of the clock.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

/// What a connection holds until it has logged in.
pub(super) type Early = (Counted, SourceSlot);

/// What can change while the server runs; a connection keeps what it began with.
pub(super) struct Settings {
    pub(super) config: Arc<Config>,
    pub(super) transport: Transport,
}

/// What all connections share.
pub(super) struct Server {
    pub(super) settings: watch::Sender<Arc<Settings>>,
    pub(super) store: Store,
    pub(super) backend: Arc<dyn Backend>,
    pub(super) users: UserConnections,
    pub(super) code_tries: CodeTries,
    /// Bytes in the queues of all connections.
    pub(super) queued: Arc<AtomicUsize>,
    /// Cancelled when the server is to stop.
    pub(super) stop: CancellationToken,
    pub(super) numbers: AtomicU64,
}

impl Server {
    /// The settings as they are now.
    pub(super) fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.borrow())
    }

    /// Somebody has logged in.
    pub(super) fn admit(
        &self,
        config: Arc<Config>,
        login: Login,
        handle: Handle,
        ends: Ends,
        span: Span,
    ) -> Arc<Client> {
        span.record("user", login.user.name.as_str());
        let meter = Meter::new(Arc::clone(login.slot.share()), Arc::clone(&self.queued));
        let (store, credential, user) = (self.store.clone(), login.credential.clone(), login.user.id);
        let client = Client::new(config, Arc::clone(&self.backend), login, handle, ends, meter, span);
        // When a key was last used is good to know, but nobody waits for it.
        client.spawn(async move {
            let noted = match &credential {
                Credential::Key(fingerprint) => store.key_used(fingerprint, ends.peer.ip()).await,
                Credential::Certificate(certified) => store.authority_used(&certified.name.authority, user).await,
            };
            if let Err(error) = noted {
                tracing::warn!(%error, %credential, "cannot note that a key was used");
            }
        });
        client
    }
}

/// Serves a connection; returns what it has done if it came to nothing. `early` is held until it has logged in.
pub(super) async fn serve(server: Arc<Server>, stream: TcpStream, ends: Ends, early: Early) -> Option<Offence> {
    let number = server.numbers.fetch_add(1, Ordering::Relaxed);
    let span = tracing::info_span!("ssh", connection = number, peer = %ends.peer, user = tracing::field::Empty);
    let mut course = Course::default();
    let ended = run(server, stream, ends, early, span.clone(), &mut course).await;
    if let Err(end) = &ended {
        // Port scanners come by all day.
        tracing::debug!(parent: &span, reason = %end, "the connection ended");
    }
    let tried = course.refused.load(Ordering::Relaxed) > 0;
    match ended {
        _ if course.logged_in => None,
        Err(ConnectionEnd::Stopping) => None,
        Err(ConnectionEnd::Grace) => Some(Offence::Slow),
        Err(ConnectionEnd::NoSsh) => Some(Offence::Garbage),
        _ if tried => Some(Offence::Failed),
        _ => Some(Offence::Silent),
    }
}

/// How far a connection has come.
#[derive(Default)]
struct Course {
    logged_in: bool,
    /// Keys, certificates and codes that did not let it in.
    refused: Arc<AtomicUsize>,
}

/// Why a connection ended otherwise than by the client's wish.
#[derive(Debug, thiserror::Error)]
enum ConnectionEnd {
    #[error("no login within the grace time")]
    Grace,
    #[error("the client speaks no SSH 2")]
    NoSsh,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Ssh(#[from] russh::Error),
    #[error("the server is stopping")]
    Stopping,
    #[error("{0}")]
    Dismissed(String),
}

async fn run(
    server: Arc<Server>,
    stream: TcpStream,
    ends: Ends,
    early: Early,
    span: Span,
    course: &mut Course,
) -> Result<(), ConnectionEnd> {
    let settings = server.settings();
    let grace = Instant::now() + Duration::from_secs(settings.config.ssh.login_grace_seconds.max(1));
    stream.set_nodelay(true)?;
    // From before anybody is let in, so that no change after that is missed.
    let access = server.store.access_changes();
    let mut stream = BufReader::with_capacity(READ_BUFFER, stream);
    let greeted = tokio::time::timeout_at(grace, exchange_identification(&mut stream));
    let identification = tokio::select! {
        greeted = greeted => greeted.map_err(|_| ConnectionEnd::Grace)??,
        () = server.stop.cancelled() => return Err(ConnectionEnd::Stopping),
    };
    let cut = CancellationToken::new();
    let _cut_at_the_end = cut.clone().drop_guard();
    let text = String::from_utf8_lossy(&identification);
    let transport = settings.transport.for_client(text.trim_end());
    let wire = Wire::new(stream, identification.clone().into(), cut.clone());
    let (arrival, arrived) = oneshot::channel();
    let config = Arc::clone(&settings.config);
    let refused = Arc::clone(&course.refused);
    let callbacks = Callbacks::new(Arc::clone(&server), config, ends, span, arrival, refused);
    let mut session = run_stream(transport, wire, callbacks).await?;
    let handle = session.handle();
    let client = tokio::select! {
        ended = &mut session => return Ok(ended?),
        arrived = arrived => arrived.map_err(|_| russh::Error::Disconnect)?,
        () = tokio::time::sleep_until(grace) => return Err(ConnectionEnd::Grace),
        () = server.stop.cancelled() => return Err(ConnectionEnd::Stopping),
    };
    course.logged_in = true;
    drop(early);
    client.spawn(watch_access(Arc::clone(&server), Arc::clone(&client), access));
    let ended = tokio::select! {
        ended = &mut session => ended.map_err(ConnectionEnd::from),
        reason = client.dismissed() => {
            tracing::info!(parent: &client.span, reason, "ending the connection");
            say_goodbye(&handle, &reason).await;
            _ = tokio::time::timeout(LAST_WORDS, &mut session).await;
            Err(ConnectionEnd::Dismissed(reason))
        }
        () = server.stop.cancelled() => {
            match tokio::time::timeout(DRAIN, &mut session).await {
                Ok(ended) => ended.map_err(ConnectionEnd::from),
                Err(_) => {
                    say_goodbye(&handle, RESTART).await;
                    _ = tokio::time::timeout(LAST_WORDS, &mut session).await;
                    Err(ConnectionEnd::Stopping)
                }
            }
        }
    };
    cut.cancel();
    client.finished().await;
    ended
}

/// Sends our identification and reads the client's, which says what to offer it.
async fn exchange_identification(stream: &mut BufReader<TcpStream>) -> Result<Vec<u8>, ConnectionEnd> {
    stream.write_all(format!("{IDENTIFICATION}\r\n").as_bytes()).await?;
    let mut line = Vec::new();
    (&mut *stream).take(MAX_IDENTIFICATION).read_until(b'\n', &mut line).await?;
    if !line.ends_with(b"\n") || !(line.starts_with(b"SSH-2.0-") || line.starts_with(b"SSH-1.99-")) {
        _ = stream.write_all(b"Invalid SSH identification string.\r\n").await;
        return Err(ConnectionEnd::NoSsh);
    }
    Ok(line)
}

async fn say_goodbye(handle: &Handle, words: &str) {
    let said = handle.disconnect(Disconnect::ByApplication, words.into(), String::new());
    _ = tokio::time::timeout(LAST_WORDS, said).await;
}

/// Ends the connection when its user may not be here any more.
async fn watch_access(server: Arc<Server>, client: Arc<Client>, mut access: watch::Receiver<u64>) {
    let watching = async {
        loop {
            let until = match standing(&server.store, &client, Timestamp::now()).await {
                Ok(Standing::Until(until)) => until,
                Ok(Standing::Out(reason)) => return client.dismiss(reason),
                Err(error) => {
                    tracing::warn!(%error, "it is not known whether somebody may still be here; asking again");
                    tokio::time::sleep(ASK_AGAIN).await;
                    continue;
                }
            };
            tokio::select! {
                changed = access.changed() => if changed.is_err() { return },
                () = reached(until) => {}
            }
        }
    };
    tokio::select! {
        () = watching => {}
        () = client.lost.cancelled() => {}
    }
}

/// Whether the user of a connection may still be here.
enum Standing {
    /// They may, until then if a time is given.
    Until(Option<Timestamp>),
    /// They may not, because of this.
    Out(String),
}

async fn standing(store: &Store, client: &Client, now: Timestamp) -> Result<Standing, StoreError> {
    let own = client.workplace.user();
    let standing = match &client.credential {
        Credential::Key(key) => standing_of_key(store, own, key, now).await,
        Credential::Certificate(certified) => standing_of_certificate(store, own, certified, now).await,
    }?;
    if let Standing::Until(_) = standing {
        client.set_policy(store.forwarding_of(own.id).await?);
    }
    Ok(standing)
}

async fn standing_of_key(store: &Store, own: &UserRecord, key: &str, now: Timestamp) -> Result<Standing, StoreError> {
    let Some(known) = store.user_by_key(key).await? else {
        let reason = format!("the key {key} was removed; log in with another, or ask an administrator");
        return Ok(Standing::Out(reason));
    };
    Ok(if known.user.id != own.id {
        Standing::Out(format!("the key {key} is somebody else's now"))
    } else if !known.user.enabled {
        Standing::Out(disabled(&known.user))
    } else if known.has_expired(now) {
        Standing::Out(expired(key))
    } else {
        Standing::Until(known.expires_at)
    })
}

async fn standing_of_certificate(
    store: &Store,
    own: &UserRecord,
    certified: &Certified,
    now: Timestamp,
) -> Result<Standing, StoreError> {
    let user = match store.user_by_id(own.id).await {
        Ok(user) => user,
        Err(StoreError::NotFound { .. }) => {
            return Ok(Standing::Out(format!("there is no user {} any more; ask an administrator", own.name)));
        }
        Err(error) => return Err(error),
    };
    let authority = &certified.name.authority;
    Ok(if !user.enabled {
        Standing::Out(disabled(&user))
    } else if !store.is_trusted(authority, own.id).await? {
        Standing::Out(format!("the authority {authority} of your certificate is not trusted any more"))
    } else if store.is_revoked(&certified.name).await? {
        Standing::Out(revoked(certified))
    } else if certified.expires_at.is_some_and(|end| end <= now) {
        Standing::Out("your certificate has expired; ask for another".into())
    } else {
        Standing::Until(certified.expires_at)
    })
}

fn disabled(user: &UserRecord) -> String {
    format!("{} may not log in any more; ask an administrator", user.name)
}

/// Returns when this time may have come. The clock can be set meanwhile, so it is looked at again before long.
async fn reached(time: Option<Timestamp>) {
    let Some(time) = time else { return std::future::pending().await };
    let left = Duration::try_from(time.duration_since(Timestamp::now())).unwrap_or_default();
    // Rather after it than just before: a timer counts in milliseconds.
    tokio::time::sleep(left.min(LOOK_AGAIN) + Duration::from_millis(1)).await;
}

/// The socket as russh sees it. The identifications were exchanged already: the client's is read once more,
/// and the one that russh writes is swallowed. It can be cut, which ends the session's loop.
struct Wire {
    stream: BufReader<TcpStream>,
    replay: Bytes,
    swallow: usize,
    cut: CancellationToken,
    when_cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Wire {
    fn new(stream: BufReader<TcpStream>, replay: Bytes, cut: CancellationToken) -> Self {
        let when_cut = Box::pin(cut.clone().cancelled_owned());
        Self { stream, replay, swallow: IDENTIFICATION.len() + 2, cut, when_cut }
    }

    /// What to answer: nothing more once it is cut, and a wake-up then if there is nothing now.
    fn unless_cut<T>(&mut self, context: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if self.cut.is_cancelled() || (result.is_pending() && self.when_cut.as_mut().poll(context).is_ready()) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        result
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        target: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.replay.has_remaining() {
            let count = self.replay.len().min(target.remaining());
            target.put_slice(&self.replay.split_to(count));
            return Poll::Ready(Ok(()));
        }
        let result = Pin::new(&mut self.stream).poll_read(context, target);
        self.unless_cut(context, result)
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.swallow > 0 && !bytes.is_empty() {
            let count = self.swallow.min(bytes.len());
            self.swallow -= count;
            return Poll::Ready(Ok(count));
        }
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.unless_cut(context, result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
