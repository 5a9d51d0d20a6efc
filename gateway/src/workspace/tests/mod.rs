//! Tests of the whole room against a world that can be broken.

mod chance;
mod crash;
mod ending;
mod entering;
mod failing;
mod idle;
mod projects;
mod view;
pub(crate) mod world;

use super::{Attached, Clock as _, Entering, Progress, Wish, WorkspaceError, Workspaces, controller::Parts};
use crate::{
    config::Config,
    image::Catalog,
    runtime::WorkloadSpec,
    store::{Store, UserRecord},
};
use mlad::{
    api::{Need, NewUser, Workspace, WorkspaceState},
    channel::AgentConfig,
};
use std::{collections::BTreeMap, future::Future, path::Path, sync::Arc, time::Duration};
use tempfile::TempDir;
use view::View;
use world::World;

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A gateway on a world, with a database in a folder.
pub(crate) struct Bench {
    pub(crate) world: World,
    pub(crate) workspaces: Workspaces,
    pub(crate) store: Store,
    view: Arc<View>,
    config: Arc<Config>,
    folder: Arc<TempDir>,
}

impl Bench {
    /// A machine with this many slices.
    pub(crate) async fn new(slots: usize) -> Self {
        Self::with(slots, "").await
    }

    /// The same with more in the section `[workspace]` of the settings.
    pub(crate) async fn with(slots: usize, settings: &str) -> Self {
        let folder = Arc::new(tempfile::tempdir().unwrap());
        let config = Arc::new(config(folder.path(), settings));
        Self::on(World::new(slots), config, folder, -1).await
    }

    async fn on(world: World, config: Arc<Config>, folder: Arc<TempDir>, crash_after: i64) -> Self {
        let store = Store::open(&folder.path().join("gateway.db")).await.unwrap();
        let view = View::new(&world, crash_after);
        let workspaces = Workspaces::start_with(Parts {
            config: Arc::clone(&config),
            store: store.clone(),
            allocator: Arc::clone(&view) as _,
            runtime: Arc::clone(&view) as _,
            catalog: Arc::new(Catalog::load(&config, store.clone()).unwrap()),
            observer: Arc::clone(&view) as _,
            clock: world.clock(),
        })
        .await
        .unwrap();
        Self { world, workspaces, store, view, config, folder }
    }

    /// Ends the gateway as `kill -9` does, and starts another.
    pub(crate) async fn crash(self) -> Self {
        self.crash_to(-1).await
    }

    /// The same, and the new one is to crash after so many calls.
    async fn crash_to(self, crash_after: i64) -> Self {
        self.view.crash();
        self.workspaces.controller.killed().await;
        self.world.lock().observed.clear();
        Self::on(self.world.clone(), self.config.clone(), self.folder.clone(), crash_after).await
    }

    pub(crate) async fn user(&self, name: &str) -> UserRecord {
        match self.store.user_by_name(name).await {
            Ok(user) => user,
            Err(_) => self.store.add_user(&NewUser { name: name.into(), role: None, uid: None }).await.unwrap(),
        }
    }

    pub(crate) async fn enter(&self, user: &str, wish: Wish) -> Result<Entering, WorkspaceError> {
        self.workspaces.enter(&self.user(user).await, wish).await
    }

    /// Enters and waits until it runs.
    pub(crate) async fn attach(&self, user: &str) -> Attached {
        ready(self.enter(user, wish("default")).await.unwrap()).await.unwrap()
    }

    pub(crate) async fn get(&self, user: &str) -> Workspace {
        self.workspaces.get(user, "default").await.unwrap()
    }

    /// Waits until the user's workspace is in this state, and answers it.
    pub(crate) async fn until_state(&self, user: &str, state: WorkspaceState) -> Workspace {
        eventually(|| async {
            let workspace = self.get(user).await;
            (workspace.state == state).then_some(workspace)
        })
        .await
    }

    /// Goes on in time, in steps after which every lease is renewed that is due.
    pub(crate) async fn pass_time(&self, minutes: u64) {
        for _ in 0..minutes * 2 {
            self.world.clock().advance(Duration::from_secs(30));
            let enough = super::later(self.world.clock().now(), Duration::from_secs(55));
            eventually(|| async {
                let running = self.workspaces.list(None).await.unwrap();
                let state = self.world.lock();
                let renewed = |workspace: &Workspace| match &workspace.lease {
                    Some(lease) => state.leases.get(&lease.workload).is_none_or(|lease| lease.expires_at >= enough),
                    None => true,
                };
                running.iter().all(renewed).then_some(())
            })
            .await;
        }
    }

    /// Nothing has happened that must not, and nothing is left over.
    pub(crate) async fn assert_clean(&self) {
        eventually(|| async {
            let state = self.world.lock();
            let clean = state.containers.is_empty() && state.leases.is_empty() && state.queue.is_empty();
            (clean && state.observed.is_empty()).then_some(())
        })
        .await;
        self.assert_lawful();
    }

    pub(crate) fn assert_lawful(&self) {
        assert_eq!(self.world.lock().violations, Vec::<String>::new());
    }
}

fn config(folder: &Path, settings: &str) -> Config {
    let catalog = "[[image]]\nname = 'base'\nreference = 'mlad/base:1'\ndescription = 'Debian with Python'\n\
                   [[image]]\nname = 'torch'\nreference = 'mlad/torch:1'\ndescription = 'PyTorch'\n\
                   min_gpu_memory_mib = 8000\n\
                   [[image]]\nname = 'far'\nreference = 'registry.example/far:1'\ndescription = 'Elsewhere'\n\
                   [[image]]\nname = 'lost'\nreference = 'registry.example/lost:1'\ndescription = 'Nowhere'\n";
    std::fs::write(folder.join("catalog.toml"), catalog).unwrap();
    let folder = folder.display();
    let text = format!(
        "data_directory = '{folder}/data'\nrun_directory = '{folder}/run'\nagent_binary = '/x'\n\
         catalog = '{folder}/catalog.toml'\n[workspace]\n{settings}\n"
    );
    let mut config: Config = toml::from_str(&text).unwrap();
    if settings.is_empty() {
        config.workspace.default_image = Some("base".into());
        config.workspace.default_need = Some(Need::Profile("1g.5gb".into()));
    }
    config
}

pub(crate) fn wish(name: &str) -> Wish {
    Wish { name: name.into(), image: None, need: None, project: None }
}

pub(crate) fn wish_for(name: &str, image: &str, need: &str) -> Wish {
    Wish { name: name.into(), image: Some(image.into()), need: Some(need.parse().unwrap()), project: None }
}

/// Waits until it runs.
pub(crate) async fn ready(mut entering: Entering) -> Result<Attached, WorkspaceError> {
    let work = async {
        loop {
            if let Progress::Ready(attached) = entering.next().await? {
                return Ok(attached);
            }
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("it is ready, or never will be, in time")
}

/// The place in the queue that is told next.
pub(crate) async fn place(entering: &mut Entering) -> (u32, u32) {
    let work = async {
        loop {
            match entering.next().await.unwrap() {
                Progress::Waiting(wait) => return (wait.place, wait.waiting),
                Progress::Ready(_) => panic!("it was to wait"),
                _ => {}
            }
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("a place is told in time")
}

/// Looks until there is something to see.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(look: impl Fn() -> F) -> T {
    let work = async {
        loop {
            if let Some(seen) = look().await {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, work).await.expect("it happens in time")
}

/// A container that nobody made.
fn stray() -> WorkloadSpec {
    WorkloadSpec {
        name: String::new(),
        hostname: "stray".into(),
        fence: 0,
        image: "sha256:stray".into(),
        agent: AgentConfig {
            workload: String::new(),
            user: "nobody".into(),
            uid: 1,
            gid: 1,
            home: "/".into(),
            environment: BTreeMap::new(),
            job: None,
            network: None,
        },
        mounts: Vec::new(),
        gpu_uuids: Vec::new(),
        node: None,
        memory_mib: 1,
        cpu_milli: 1,
    }
}
