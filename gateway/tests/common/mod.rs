//! A server in this process, an agent beside it, and people with OpenSSH's client.

#![allow(dead_code, unused_imports, unreachable_pub, missing_docs, reason = "every test program uses its part")]

mod agent;
mod lobby;
mod person;
pub mod scripted;

pub use agent::Agent;
pub use lobby::Lobby;
pub use person::{Outcome, Person, free_port};
pub use scripted::Scripted;

use async_trait::async_trait;
use mlad::api::{NewKey, NewUser};
use mlad_gateway::{
    config::Config,
    files::WorkerProcess,
    login::{self, Terminal},
    runtime::RuntimeError,
    ssh::{self, Backend, Entered, Place, Refusal, SshState, Worker, WorkerKind},
    store::{Store, UserRecord},
    workspace::Wish,
};
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, UnixStream},
    process::Command,
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// No test waits longer for one thing.
const PATIENCE: Duration = Duration::from_secs(120);

/// Waits for what must come.
pub async fn soon<T>(what: &str, comes: impl Future<Output = T>) -> T {
    timeout(PATIENCE, comes).await.unwrap_or_else(|_| panic!("in vain: {what}"))
}

/// Waits for something of another process that nobody tells of.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let held = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon(what, held).await;
}

/// A server, an agent, and where their files lie.
pub struct Site {
    pub store: Store,
    pub address: SocketAddr,
    pub settings: watch::Sender<Arc<Config>>,
    pub backend: Arc<Stage>,
    pub shutdown: CancellationToken,
    pub server: JoinHandle<()>,
    folder: tempfile::TempDir,
}

impl Site {
    /// A server with the settings in `settings` (lines of the table `ssh`).
    pub async fn with_settings(settings: &str) -> Self {
        Self::prepared(settings, |_| {}).await
    }

    /// The same, with something done to its data folder before it starts.
    pub async fn prepared(settings: &str, prepare: impl FnOnce(&Path)) -> Self {
        // Shown for tests that fail, or with RUST_LOG.
        let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
        let folder = tempfile::Builder::new().prefix("mlad-ssh").tempdir().unwrap();
        open_to_all(folder.path());
        let path = folder.path().display();
        let config: Config = toml::from_str(&format!(
            "data_directory = '{path}/data'\nrun_directory = '{path}/run'\nagent_binary = '/x'\ncatalog = '/x'\n[ssh]\n{settings}\n"
        ))
        .unwrap();
        std::fs::create_dir_all(&config.data_directory).unwrap();
        prepare(&config.data_directory);
        let store = Store::open(&config.data_directory.join("gateway.db")).await.unwrap();
        let backend = Arc::new(Stage::new(Agent::start(&folder.path().join("box")).await));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let settings = watch::Sender::new(Arc::new(config));
        let state = SshState { config: settings.subscribe(), store: store.clone(), backend: backend.clone() };
        let serving = ssh::serve(state, vec![listener], shutdown.clone());
        let server = tokio::spawn(async move { serving.await.unwrap() });
        Self { store, address, settings, backend, shutdown, server, folder }
    }

    /// A server with the usual settings.
    pub async fn start() -> Self {
        Self::with_settings("").await
    }

    /// Changes a setting while the server runs; connections to come will have it.
    pub fn change(&self, change: impl FnOnce(&mut Config)) {
        self.settings.send_modify(|config| change(Arc::make_mut(config)));
    }

    /// A user.
    pub async fn user(&self, name: &str) -> UserRecord {
        self.store.add_user(&NewUser { name: name.into(), role: None, uid: None }).await.unwrap()
    }

    /// Somebody with a key that nobody knows.
    pub fn stranger(&self, name: &str) -> Person {
        Person::new(&self.folder.path().join("people").join(name), self.address)
    }

    /// A user with a key.
    pub async fn person(&self, name: &str) -> Person {
        let user = self.user(name).await;
        let person = self.stranger(name);
        self.give_key(&user, &person).await;
        person
    }

    /// Lets a person's key in as a user.
    pub async fn give_key(&self, user: &UserRecord, person: &Person) {
        let key = NewKey { public_key: person.public_key(), label: None, expires_at: None };
        self.store.add_key(user.id, &ssh::parse_key(&key).unwrap()).await.unwrap();
    }

    /// From now on the agent of the workspaces is one that a test has written.
    pub fn agent_is(&self, scripted: &Scripted) {
        *self.backend.socket() = scripted.socket();
    }

    /// From now on people with a terminal come by the real login room: with its picker, unless `MLAD_IMAGE` says
    /// which image.
    pub async fn open_lobby(&self) -> &Lobby {
        let lobby = Lobby::open(&self.path("lobby"), &self.store, self.backend.agent.socket()).await;
        assert!(self.backend.lobby.set(lobby).is_ok());
        self.backend.lobby.get().unwrap()
    }

    /// A folder for a test's files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// The agent's user must reach their home through it.
fn open_to_all(folder: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// What is behind the door in these tests: one agent, and plain programs as workers.
pub struct Stage {
    pub agent: Agent,
    /// Whether workspaces are ready; who comes before waits.
    pub ready: watch::Sender<bool>,
    /// What was wished for.
    pub wishes: Mutex<Vec<Wish>>,
    /// Why nobody gets in; empty if everybody does.
    pub refusal: Mutex<Option<Refusal>>,
    /// Who gave up waiting.
    pub given_up: Arc<Mutex<usize>>,
    /// Cancelled when the workspace ends.
    pub ended: CancellationToken,
    /// Whether the workspace runs: since somebody entered it.
    pub runs: AtomicBool,
    socket: Mutex<PathBuf>,
    lobby: OnceLock<Lobby>,
}

impl Stage {
    fn new(agent: Agent) -> Self {
        Self {
            socket: Mutex::new(agent.socket()),
            agent,
            ready: watch::Sender::new(true),
            wishes: Mutex::default(),
            refusal: Mutex::default(),
            given_up: Arc::default(),
            ended: CancellationToken::new(),
            runs: AtomicBool::new(false),
            lobby: OnceLock::new(),
        }
    }

    /// Where the agent of the workspaces is.
    pub fn socket(&self) -> MutexGuard<'_, PathBuf> {
        self.socket.lock().unwrap()
    }

    fn room(&self) -> Box<dyn Place> {
        Box::new(Room { socket: self.socket().clone(), ended: self.ended.clone() })
    }

    async fn wait(&self) {
        struct Waiting(Arc<Mutex<usize>>, bool);
        impl Drop for Waiting {
            fn drop(&mut self) {
                if !self.1 {
                    *self.0.lock().unwrap() += 1;
                }
            }
        }
        let mut waiting = Waiting(self.given_up.clone(), false);
        self.ready.subscribe().wait_for(|ready| *ready).await.unwrap();
        waiting.1 = true;
    }
}

#[async_trait]
impl Backend for Stage {
    async fn enter(
        &self,
        user: &UserRecord,
        wish: Wish,
        terminal: Option<&mut dyn Terminal>,
    ) -> Result<Entered, Refusal> {
        self.wishes.lock().unwrap().push(wish.clone());
        let refusal = self.refusal.lock().unwrap().clone();
        if let Some(refusal) = refusal {
            return Err(refusal);
        }
        if let Some(terminal) = terminal {
            if let Some(Lobby { workspaces, .. }) = self.lobby.get() {
                let entered = login::enter_with_terminal(terminal, workspaces, user, wish).await;
                let login::Entered { attached, typed } = entered.map_err(Refusal::from)?;
                return Ok(Entered { place: Box::new(attached), typed });
            }
            terminal.write(b"welcome\r\n").await.unwrap();
        }
        self.wait().await;
        self.runs.store(true, Ordering::Relaxed);
        Ok(Entered { place: self.room(), typed: Vec::new() })
    }

    async fn running(&self, _: &UserRecord, _: &str) -> Option<Box<dyn Place>> {
        self.runs.load(Ordering::Relaxed).then(|| self.room())
    }

    async fn sftp(&self, _: &UserRecord) -> Result<Worker, Refusal> {
        Ok(worker("/usr/lib/openssh/sftp-server", &[]))
    }

    async fn scp(&self, _: &UserRecord, command: &[u8]) -> Result<Option<Worker>, Refusal> {
        Ok(command.starts_with(b"scp -").then(|| worker("/bin/sh", &["-c", std::str::from_utf8(command).unwrap()])))
    }

    async fn mlad(
        &self,
        user: &UserRecord,
        arguments: &[String],
        _: &[(String, String)],
        _: Option<(u16, u16)>,
    ) -> Result<Worker, Refusal> {
        let script = "printf '%s\\n' \"$@\"; cat; exit 3";
        let arguments = ["-c", script, "mlad", &user.name].into_iter().chain(arguments.iter().map(String::as_str));
        Ok(worker("/bin/sh", &arguments.collect::<Vec<_>>()))
    }
}

fn worker(program: &str, arguments: &[&str]) -> Worker {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let (stdin, stdout, stderr) =
        (child.stdin.take().unwrap(), child.stdout.take().unwrap(), child.stderr.take().unwrap());
    Worker { process: WorkerKind::Pipes(WorkerProcess { stdin, stdout, stderr, child }), guard: None }
}

#[derive(Clone)]
struct Room {
    socket: PathBuf,
    ended: CancellationToken,
}

#[async_trait]
impl Place for Room {
    async fn connect(&self) -> Result<UnixStream, RuntimeError> {
        UnixStream::connect(&self.socket).await.map_err(|error| RuntimeError::Gone(error.to_string()))
    }

    async fn ended(&self) -> String {
        self.ended.cancelled().await;
        "stopped by a test".into()
    }

    fn another(&self) -> Box<dyn Place> {
        Box::new(self.clone())
    }
}
