//! What is really behind the door: the workspaces, and the workers of this host.

use super::backend::{Backend, Entered, Place, Refusal, Worker, WorkerKind};
use crate::{
    api::{self, ApiState},
    config::Config,
    files::{self, FilesError},
    login::{self, LoginEnd, Terminal},
    runtime::RuntimeError,
    store::{Store, StoreError, UserRecord},
    workspace::{Attached, Notice, Wish, WorkspaceError, Workspaces},
};
use async_trait::async_trait;
use mlad::api::{ExitCode, Identity};
use std::{
    io,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinSet},
};

/// Connections of one `mlad` to the API at once.
const MAX_API_CONNECTIONS: usize = 16;

/// The gateway's own parts.
#[derive(Clone)]
pub struct Gateway {
    config: Arc<Config>,
    store: Store,
    workspaces: Workspaces,
    api: ApiState,
    sockets: Arc<AtomicU64>,
}

impl Gateway {
    /// The parts together.
    pub fn new(config: Arc<Config>, store: Store, workspaces: Workspaces, api: ApiState) -> Self {
        Self { config, store, workspaces, api, sockets: Arc::default() }
    }

    /// Starts a worker, with the user's home there; on a thread where that may take its time.
    async fn start<W: Send + 'static>(
        &self,
        user: &UserRecord,
        spawn: impl FnOnce(&Config, &UserRecord) -> Result<W, FilesError> + Send + 'static,
    ) -> Result<W, Refusal> {
        let (config, user) = (Arc::clone(&self.config), user.clone());
        let started = tokio::task::spawn_blocking(move || {
            files::ensure_home(&config, &user)?;
            spawn(&config, &user)
        });
        match started.await {
            Ok(Ok(worker)) => Ok(worker),
            Ok(Err(error)) => Err(cannot_start(&error)),
            Err(error) => Err(cannot_start(&error)),
        }
    }
}

#[async_trait]
impl Backend for Gateway {
    async fn enter(
        &self,
        user: &UserRecord,
        wish: Wish,
        terminal: Option<&mut dyn Terminal>,
    ) -> Result<Entered, Refusal> {
        let user = &reload(&self.store, user).await?;
        match terminal {
            Some(terminal) => {
                let entered = login::enter_with_terminal(terminal, &self.workspaces, user, wish).await;
                let login::Entered { attached, typed } = entered.map_err(Refusal::from)?;
                Ok(Entered { place: Box::new(attached), typed })
            }
            None => {
                let limit = Duration::from_secs(self.config.workspace.wait_without_terminal_seconds);
                let attached = login::enter_silently(&self.workspaces, user, wish, limit).await?;
                Ok(Entered { place: Box::new(attached), typed: Vec::new() })
            }
        }
    }

    async fn running(&self, user: &UserRecord, workspace: &str) -> Option<Box<dyn Place>> {
        let user = reload(&self.store, user).await.ok()?;
        match self.workspaces.attach(&user, workspace).await {
            Ok(attached) => Some(Box::new(attached?)),
            Err(error) => {
                tracing::debug!(%error, "no workspace to attach to");
                None
            }
        }
    }

    async fn sftp(&self, user: &UserRecord) -> Result<Worker, Refusal> {
        let process = self.start(&reload(&self.store, user).await?, files::spawn_sftp).await?;
        Ok(Worker { process: WorkerKind::Pipes(process), guard: None })
    }

    async fn scp(&self, user: &UserRecord, command: &[u8]) -> Result<Option<Worker>, Refusal> {
        if !command.starts_with(b"scp ") {
            return Ok(None);
        }
        let (user, command) = (&reload(&self.store, user).await?, command.to_vec());
        let process = self.start(user, move |config, user| files::spawn_scp(config, user, &command)).await?;
        Ok(process.map(|process| Worker { process: WorkerKind::Pipes(process), guard: None }))
    }

    async fn mlad(
        &self,
        user: &UserRecord,
        arguments: &[String],
        environment: &[(String, String)],
        terminal: Option<(u16, u16)>,
    ) -> Result<Worker, Refusal> {
        let user = &reload(&self.store, user).await?;
        let number = self.sockets.fetch_add(1, Ordering::Relaxed);
        let folder = self.config.run_directory.join("ssh").join(number.to_string());
        let identity = Identity { user: user.name.clone(), role: user.role, workload: None };
        let socket =
            ApiSocket::new(folder, user.uid, self.api.clone(), identity).map_err(|error| cannot_start(&error))?;
        let (path, arguments, environment) = (socket.path.clone(), arguments.to_vec(), environment.to_vec());
        let process = self
            .start(user, move |config, user| match terminal {
                Some(size) => files::spawn_mlad_on_terminal(config, user, &arguments, &path, &environment, size)
                    .map(WorkerKind::Terminal),
                None => files::spawn_mlad(config, user, &arguments, &path, &environment).map(WorkerKind::Pipes),
            })
            .await?;
        Ok(Worker { process, guard: Some(Box::new(socket)) })
    }
}

#[async_trait]
impl Place for Attached {
    fn passes_descriptors(&self) -> bool {
        Attached::passes_descriptors(self)
    }

    async fn connect(&self) -> Result<UnixStream, RuntimeError> {
        Attached::connect(self).await
    }

    fn notices(&self) -> watch::Receiver<Notice> {
        Attached::notices(self)
    }

    async fn ended(&self) -> String {
        Attached::ended(self).await
    }

    fn another(&self) -> Box<dyn Place> {
        Box::new(self.clone())
    }
}

impl From<WorkspaceError> for Refusal {
    fn from(error: WorkspaceError) -> Self {
        let lines = [Some(error.to_string()), error.hint()].into_iter().flatten().collect();
        Self { lines, exit_status: error.code().exit_code() as u32 }
    }
}

impl From<LoginEnd> for Refusal {
    fn from(end: LoginEnd) -> Self {
        Self { lines: Vec::new(), exit_status: end.exit_code() }
    }
}

/// The user as they are now: their role, quota or right to be here may be another than when they logged in.
async fn reload(store: &Store, user: &UserRecord) -> Result<UserRecord, Refusal> {
    let denied = |line: String| Err(Refusal::new(format!("{line}; ask an administrator"), ExitCode::Denied));
    match store.user_by_id(user.id).await {
        Ok(user) if user.enabled => Ok(user),
        Ok(user) => denied(format!("{} may not log in any more", user.name)),
        Err(StoreError::NotFound { .. }) => denied(format!("there is no user {} any more", user.name)),
        Err(error) => {
            tracing::error!(%error, "nothing can be started: the database fails");
            let line = "the server's database does not answer; try again in a moment";
            Err(Refusal::new(line, ExitCode::TryLater))
        }
    }
}

fn cannot_start(error: &dyn std::fmt::Display) -> Refusal {
    tracing::error!(%error, "a worker cannot be started");
    Refusal::new("the server cannot start this now; try again in a moment", ExitCode::TryLater)
}

/// The API for one process, served as one user. It ends, and its folder is removed, when this is dropped.
struct ApiSocket {
    folder: PathBuf,
    path: PathBuf,
    server: AbortHandle,
}

impl ApiSocket {
    fn new(folder: PathBuf, uid: u32, api: ApiState, identity: Identity) -> io::Result<Self> {
        // A gateway that was killed may have left one of that number.
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::DirBuilder::new().recursive(true).mode(0o711).create(&folder)?;
        let path = folder.join("api.sock");
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        std::os::unix::fs::chown(&path, Some(uid), Some(uid))?;
        let server = tokio::spawn(serve_api(listener, api, identity)).abort_handle();
        Ok(Self { folder, path, server })
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        self.server.abort();
        remove(&self.folder);
    }
}

fn remove(folder: &Path) {
    if let Err(error) = std::fs::remove_dir_all(folder) {
        tracing::warn!(folder = %folder.display(), %error, "a folder is left over");
    }
}

async fn serve_api(listener: UnixListener, api: ApiState, identity: Identity) {
    let room = Arc::new(Semaphore::new(MAX_API_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the API of a worker ends");
                return;
            }
        };
        while connections.try_join_next().is_some() {}
        let (api, identity) = (api.clone(), identity.clone());
        connections.spawn(async move {
            api::serve_stream(&api, stream, identity).await;
            drop(permit);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mlad::api::{NewUser, Role};

    #[tokio::test]
    async fn who_was_disabled_or_removed_since_they_logged_in_gets_nothing_more() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("gateway.db")).await.unwrap();
        let user = store.add_user(&NewUser { name: "alice".into(), role: None, uid: None }).await.unwrap();
        store.set_user_role(user.id, Role::Admin).await.unwrap();
        assert_eq!(reload(&store, &user).await.unwrap().role, Role::Admin);
        store.set_user_enabled(user.id, false).await.unwrap();
        let refusal = reload(&store, &user).await.unwrap_err();
        assert_eq!(refusal, Refusal::new("alice may not log in any more; ask an administrator", ExitCode::Denied));
        store.remove_user(user.id).await.unwrap();
        let refusal = reload(&store, &user).await.unwrap_err();
        assert_eq!(refusal.lines, ["there is no user alice any more; ask an administrator"]);
    }
}
