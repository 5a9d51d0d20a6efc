//! Clients that keep to no window, which no SSH library can be made to do: an honest one, whose words, and those of
//! the server, are changed on the way. The transport has no cipher for that.

use super::{
    Backend, Entered, Place, Refusal, Worker,
    algorithms::Transport,
    client::Ends,
    connection::{self, Server, Settings},
    host_keys::load_host_keys,
    key::key_to_add,
    limits::{CodeTries, Counter, Sources, UserConnections},
};
use crate::{
    config::Config,
    login::Terminal,
    store::{Store, UserRecord},
    workspace::Wish,
};
use async_trait::async_trait;
use mlad::api::{ExitCode, NewUser};
use russh::{
    Preferred, cipher, client,
    keys::{PrivateKey, PrivateKeyWithHashAlg, PublicKeyOrCertificate},
    mac,
};
use std::{
    borrow::Cow,
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, DuplexStream},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_secs(30);
/// More than what can be under way in sockets and queues, and less than what is taken of somebody who is throttled.
const MUCH: usize = 48 * 1024 * 1024;

const CHANNEL_OPEN_CONFIRMATION: u8 = 91;
const CHANNEL_DATA: u8 = 94;

/// Nobody gets in, and so nobody reads what they send.
struct Closed;

#[async_trait]
impl Backend for Closed {
    async fn enter(&self, _: &UserRecord, _: Wish, _: Option<&mut dyn Terminal>) -> Result<Entered, Refusal> {
        std::future::pending().await
    }

    async fn running(&self, _: &UserRecord, _: &str) -> Option<Box<dyn Place>> {
        None
    }

    async fn sftp(&self, _: &UserRecord) -> Result<Worker, Refusal> {
        Err(Refusal::new("no", ExitCode::Failure))
    }

    async fn scp(&self, _: &UserRecord, _: &[u8]) -> Result<Option<Worker>, Refusal> {
        Ok(None)
    }

    async fn mlad(
        &self,
        user: &UserRecord,
        _: &[String],
        _: &[(String, String)],
        _: Option<(u16, u16)>,
    ) -> Result<Worker, Refusal> {
        self.sftp(user).await
    }
}

/// A server for one connection, and the key of its one user.
struct Site {
    server: Arc<Server>,
    listener: TcpListener,
    key: PrivateKey,
    _folder: tempfile::TempDir,
}

impl Site {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        let config: Config = toml::from_str(&format!(
            "data_directory = '{path}'\nrun_directory = '{path}/run'\nagent_binary = '/x'\ncatalog = '/x'\n"
        ))
        .unwrap();
        let store = Store::open(&folder.path().join("gateway.db")).await.unwrap();
        let keys = load_host_keys(&folder.path().join("ssh")).unwrap();
        let key = load_host_keys(&folder.path().join("person")).unwrap().swap_remove(0);
        let user = store.add_user(&NewUser { name: "alice".into(), role: None, uid: None }).await.unwrap();
        store.add_key(user.id, &key_to_add(key.public_key()).unwrap()).await.unwrap();
        let server = Server {
            settings: watch::Sender::new(Arc::new(Settings {
                transport: Transport::open_to_all(&config.ssh, &keys),
                config: Arc::new(config),
            })),
            users: UserConnections::default(),
            code_tries: CodeTries::new(1),
            queued: Arc::default(),
            stop: CancellationToken::new(),
            numbers: Default::default(),
            store,
            backend: Arc::new(Closed),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { server: Arc::new(server), listener, key, _folder: folder }
    }

    /// An honest client that is lied to, and for: see [`Lies`].
    async fn connect(&self, lies: Lies) -> client::Handle<Trusting> {
        let outward = TcpStream::connect(self.listener.local_addr().unwrap()).await.unwrap();
        let (stream, peer) = self.listener.accept().await.unwrap();
        let early = Counter::default().add(1).unwrap();
        let source = Sources::default().add(peer.ip(), 10).unwrap();
        let ends = Ends { peer, local: stream.local_addr().unwrap() };
        tokio::spawn(connection::serve(Arc::clone(&self.server), stream, ends, (early, source)));
        let (near, far) = tokio::io::duplex(64 * 1024);
        tokio::spawn(relay(far, outward, lies));
        let preferred = Preferred {
            cipher: Cow::Borrowed(&[cipher::NONE]),
            mac: Cow::Borrowed(&[mac::NONE]),
            ..Preferred::default()
        };
        let config = client::Config { preferred, ..client::Config::default() };
        let mut handle = client::connect_stream(Arc::new(config), near, Trusting).await.unwrap();
        let key = PrivateKeyWithHashAlg::new(Arc::new(self.key.clone()), None);
        assert!(handle.authenticate_publickey("mlad", key).await.unwrap().success());
        handle
    }

    fn queued(&self) -> usize {
        self.server.queued.load(Ordering::Relaxed)
    }
}

struct Trusting;

impl client::Handler for Trusting {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        Ok(true)
    }
}

/// What is changed on the way.
#[derive(Debug, Clone, Copy)]
struct Lies {
    /// The client is told that its windows are a thousand times as large.
    windows: bool,
    /// Whenever the client sends data, its channel is confirmed once more.
    confirmations: bool,
}

async fn relay(client: DuplexStream, server: TcpStream, lies: Lies) {
    let (from_client, to_client) = tokio::io::split(client);
    let (from_server, to_server) = server.into_split();
    let down = pass(from_server, to_client, |packet| {
        if let [_, CHANNEL_OPEN_CONFIRMATION, rest @ ..] = packet
            && lies.windows
        {
            // recipient, sender, window
            rest[8..12].copy_from_slice(&(1_u32 << 30).to_be_bytes());
        }
        None
    });
    let up = pass(from_client, to_server, |packet| match packet {
        [_, CHANNEL_DATA, channel @ ..] if lies.confirmations => Some(confirmation(&channel[..4])),
        _ => None,
    });
    let _ = tokio::join!(down, up);
}

/// Passes packets on, each followed by what `lie` makes of it: the padding's length, the message, the padding.
async fn pass(
    from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    lie: impl Fn(&mut [u8]) -> Option<Vec<u8>>,
) -> io::Result<()> {
    let mut from = BufReader::new(from);
    let mut identification = Vec::new();
    from.read_until(b'\n', &mut identification).await?;
    to.write_all(&identification).await?;
    loop {
        let mut packet = vec![0; from.read_u32().await? as usize];
        from.read_exact(&mut packet).await?;
        let more = lie(&mut packet);
        for packet in [Some(packet), more].into_iter().flatten() {
            to.write_u32(packet.len() as u32).await?;
            to.write_all(&packet).await?;
        }
    }
}

fn confirmation(channel: &[u8]) -> Vec<u8> {
    let message = [&[CHANNEL_OPEN_CONFIRMATION][..], channel, &[0; 4], &[0x10, 0, 0, 0], &[0, 0, 0x80, 0]].concat();
    // To a multiple of eight, with the length, and four at least.
    let padding = 8 - (5 + message.len()) % 8 + 8;
    [&[padding as u8][..], &message, &vec![0; padding]].concat()
}

/// Sends until the connection ends, or so much was sent; how much.
async fn flood(handle: &client::Handle<Trusting>) -> usize {
    let channel = handle.channel_open_session().await.unwrap();
    channel.exec(false, "sleep 1000").await.unwrap();
    let piece = bytes::Bytes::from(vec![0; 32 * 1024]);
    let mut sent = 0;
    while sent < MUCH && channel.data_bytes(piece.clone()).await.is_ok() {
        sent += piece.len();
    }
    sent
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_beyond_its_windows_is_cut_off() {
    let site = Site::new().await;
    for confirmations in [false, true] {
        let handle = site.connect(Lies { windows: true, confirmations }).await;
        let sent = timeout(SOON, flood(&handle)).await.expect("it is neither cut off nor taken");
        assert!(sent < MUCH, "{sent} bytes were taken (confirmations: {confirmations})");
        let gone = async {
            while !handle.is_closed() || site.queued() > 0 {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, gone).await.expect("the connection is gone, and what it had queued");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_keeps_to_its_windows_is_throttled_and_stays() {
    let site = Site::new().await;
    let handle = site.connect(Lies { windows: false, confirmations: false }).await;
    let stalled = tokio::select! {
        sent = flood(&handle) => Some(sent),
        () = async {
            while site.queued() <= 4 * 1024 * 1024 {
                tokio::task::yield_now().await;
            }
        } => None,
    };
    assert_eq!(stalled, None, "nobody reads it, so nobody may take it all");
    timeout(SOON, handle.channel_open_session()).await.unwrap().unwrap();
    assert!(site.queued() < 16 * 1024 * 1024);
}
