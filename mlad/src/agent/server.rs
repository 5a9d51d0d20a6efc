//! The agent proper: takes the gateway's connections and hands each to what it is for.

use super::{
    AgentError, Paths,
    account::{self, User},
    api_socket::{self, Gateway},
    forward,
    incoming::accept_each,
    job, limits,
    network::Door,
    process::Ending,
    resolve::Names,
    rights::Rights,
    session,
    ticket::{Guest, Tickets},
};
use crate::channel::{Connection, Frame, JobRun, Open};
use rustix::{
    fs::Mode,
    process::{Pid, Signal},
};
use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    io,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::ExitCode,
    sync::Arc,
};
use tokio::{
    net::{UnixListener, UnixStream},
    signal::unix::{SignalKind, signal},
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

// Reasons of RFC 4254 section 5.1.
pub(super) const PROHIBITED: u32 = 1;
pub(super) const CONNECT_FAILED: u32 = 2;
const RESOURCE_SHORTAGE: u32 = 4;

/// What all connections share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) user: User,
    /// What every process of the user starts from.
    pub(super) environment: BTreeMap<OsString, OsString>,
    pub(super) rights: Rights,
    pub(super) ending: Ending,
    /// Owner of the wardens of all processes, and of whatever else must be done before connections are closed: the
    /// gateway is told how sessions ended.
    pub(super) tasks: TaskTracker,
    /// Owner of the tasks that serve connections.
    connections: TaskTracker,
    pub(super) tickets: Tickets,
    pub(super) gateway: Gateway,
    pub(super) names: Names,
    /// The gateway wants the agent to end, as by SIGTERM.
    pub(super) terminate: Notify,
    in_container: bool,
    sessions: Arc<Semaphore>,
    listeners: Arc<Semaphore>,
}

impl Shared {
    /// Kills every process of the container but the agent's own two.
    pub(super) fn kill_everything(&self) {
        self.signal_everything(Signal::KILL);
    }

    fn hang_up(&self) {
        self.ending.hang_up.cancel();
    }

    fn signal_everything(&self, signal: Signal) {
        // The parent may only be another if it is gone, and then the container ends.
        if self.in_container && rustix::process::getppid() == Some(Pid::INIT) {
            // kill(-1): all but process 1 and the caller.
            let _ = rustix::process::kill_process_group(Pid::INIT, signal);
        }
    }

    /// Spawns a task that serves a connection; it ends with the agent.
    pub(super) fn spawn(&self, task: impl Future<Output = io::Result<()>> + Send + 'static) {
        let ending = self.ending.clone();
        self.connections.spawn(async move {
            tokio::select! {
                biased;
                result = task => {
                    if let Err(error) = result {
                        tracing::debug!(%error, "a connection ended");
                    }
                }
                () = ending.close.cancelled() => {}
            }
        });
    }
}

/// Runs until SIGTERM, or until the job has ended.
pub(super) fn run(paths: &Paths, in_container: bool) -> Result<ExitCode, AgentError> {
    let _ = rustix::thread::set_name(c"mlad-agent");
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(AgentError::system("cannot start"))?;
    runtime.block_on(serve(paths, in_container))
}

async fn serve(paths: &Paths, in_container: bool) -> Result<ExitCode, AgentError> {
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    // Without process 1 there is no container to serve.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(|error| AgentError::system("cannot follow process 1")(error.into()))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(AgentError::system("cannot handle signals"))?;
    let config = account::read_config(&paths.config)?;
    let user = User::of(&config).map_err(|reason| AgentError::Config { path: paths.config.clone(), reason })?;
    let environment = account::environment(&user, &config.environment);
    account::install(&user, paths, environment.get(OsStr::new("PATH")).map(OsString::as_os_str));
    let shared = Arc::new(Shared {
        environment,
        rights: Rights::of(&user),
        user,
        ending: Ending::default(),
        tasks: TaskTracker::new(),
        connections: TaskTracker::new(),
        tickets: Tickets::default(),
        gateway: Gateway::default(),
        names: Names::default(),
        terminate: Notify::new(),
        in_container,
        sessions: Arc::new(Semaphore::new(limits::SESSIONS)),
        listeners: Arc::new(Semaphore::new(limits::LISTENERS)),
    });
    let door = match &config.network {
        Some(network) => Some(Door::open(network).await?),
        None => None,
    };
    let api_listener = listen(&paths.api_socket, 0o666)?;
    // Last: whoever can connect to it finds everything else there.
    let listener = listen(&paths.agent_socket, 0o600)?;
    tracing::info!(workload = config.workload, user = shared.user.name, "the agent is ready");
    let stop = CancellationToken::new();
    let mut work = std::pin::pin!(work(config.job.as_ref(), paths, &shared, &stop));
    let result = tokio::select! {
        () = accept(listener, &shared) => Ok(ExitCode::SUCCESS),
        () = accept_from_afar(door, &shared) => Ok(ExitCode::SUCCESS),
        () = api_socket::accept(api_listener, &shared) => Ok(ExitCode::SUCCESS),
        result = &mut work => result,
        () = told_to_end(&mut terminate, &shared) => {
            stop.cancel();
            shared.hang_up();
            work.await
        }
    };
    end(&shared).await;
    result
}

async fn told_to_end(terminate: &mut tokio::signal::unix::Signal, shared: &Shared) {
    tokio::select! {
        _ = terminate.recv() => {}
        () = shared.terminate.notified() => {}
    }
}

async fn accept_from_afar(door: Option<Door>, shared: &Arc<Shared>) {
    match door {
        Some(door) => door.accept(shared).await,
        None => std::future::pending().await,
    }
}

/// Returns when there is no more to do: when the job has ended, or a workspace is to stop.
async fn work(
    job: Option<&JobRun>,
    paths: &Paths,
    shared: &Shared,
    stop: &CancellationToken,
) -> Result<ExitCode, AgentError> {
    match job {
        Some(job) => job::run(job, paths, shared, stop).await.map(|exit| job::exit_code(&exit)),
        None => {
            stop.cancelled().await;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Binds a socket, in the place of one that an earlier run of this container left.
fn listen(path: &Path, mode: u32) -> Result<UnixListener, AgentError> {
    let bind = || {
        path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        Ok(listener)
    };
    bind().map_err(AgentError::system(format!("cannot listen on {}", path.display())))
}

/// Hangs up all sessions, gives them time, and kills the rest.
async fn end(shared: &Shared) {
    tracing::info!("the agent ends: hanging up");
    shared.hang_up();
    shared.signal_everything(Signal::TERM);
    shared.tasks.close();
    let _ = tokio::time::timeout(limits::GRACE, shared.tasks.wait()).await;
    shared.ending.kill.cancel();
    shared.kill_everything();
    let _ = tokio::time::timeout(limits::FAREWELL, shared.tasks.wait()).await;
    shared.ending.close.cancel();
    shared.connections.close();
    let _ = tokio::time::timeout(limits::FAREWELL, shared.connections.wait()).await;
}

async fn accept(listener: UnixListener, shared: &Arc<Shared>) {
    let accept = async || listener.accept().await.map(|(stream, _)| stream);
    let serve = |stream, permit| {
        let task = Arc::clone(shared);
        shared.spawn(async move { open(stream, &task, permit).await });
    };
    accept_each(limits::CONNECTIONS, "the agent's socket", accept, serve).await;
}

/// Serves one connection to its end.
pub(super) async fn open(stream: UnixStream, shared: &Arc<Shared>, permit: OwnedSemaphorePermit) -> io::Result<()> {
    let mut connection = Connection::new(stream, true);
    let first = tokio::time::timeout(limits::OPEN_TIME, connection.reader.read()).await??;
    let Some(Frame::Open(open)) = first else { return Err(io::ErrorKind::InvalidData.into()) };
    match open {
        Open::Session => match Arc::clone(&shared.sessions).try_acquire_owned() {
            Ok(_place) => session::serve(connection, shared).await,
            Err(_) => refuse_for_want(connection, "sessions").await,
        },
        Open::DirectTcpip { host, port } => {
            forward::direct_tcpip(Guest { connection, permit }, &host, port, shared).await
        }
        Open::DirectStreamlocal { path } => {
            forward::direct_streamlocal(Guest { connection, permit }, &path, shared).await
        }
        Open::TcpipForward { address, port } => match Arc::clone(&shared.listeners).try_acquire_owned() {
            Ok(_place) => forward::tcpip_forward(connection, &address, port, shared).await,
            Err(_) => refuse_for_want(connection, "listeners").await,
        },
        Open::StreamlocalForward { path } => match Arc::clone(&shared.listeners).try_acquire_owned() {
            Ok(_place) => forward::streamlocal_forward(connection, &path, shared).await,
            Err(_) => refuse_for_want(connection, "listeners").await,
        },
        Open::Accept { ticket } => match shared.tickets.redeem(ticket, Guest { connection, permit }) {
            Ok(()) => Ok(()),
            Err(guest) => refuse(guest.connection, CONNECT_FAILED, "that connection is not there any more").await,
        },
        Open::Control => api_socket::control(connection, shared).await,
        Open::Terminate => {
            shared.terminate.notify_one();
            connection.writer.write(&Frame::Opened { port: 0 }).await
        }
    }
}

/// Answers that a channel is not opened.
///
/// # Errors
/// When the connection fails.
pub(super) async fn refuse(mut connection: Connection, reason: u32, message: &str) -> io::Result<()> {
    connection.writer.write(&Frame::OpenFailure { reason, message: message.into() }).await
}

async fn refuse_for_want(connection: Connection, what: &str) -> io::Result<()> {
    refuse(connection, RESOURCE_SHORTAGE, &format!("the container has as many {what} as it may")).await
}
