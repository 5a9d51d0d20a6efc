//! What the actors share: the rooms they work with, the news of allocator and runtime, and the reaping of
//! what nobody wants.

use super::{
    Clock, WorkspaceError,
    actor::Actor,
    clock::later,
    live::{Choice, Joined, Live},
    state::parse_workload_name,
};
use crate::{
    config::Config,
    files,
    image::Catalog,
    runtime::{Found, FoundState, Runtime, RuntimeEvent, WorkloadObserver},
    store::{Store, StoreError, UserRecord, WorkspaceRecord},
};
use futures::StreamExt as _;
use mlad::api::{Lease, Wait};
use mlad_allocator::{Allocate, AllocatorError, LeaseState};
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use tracing::{info, warn};

/// How long tasks may take to end when the gateway is shut down, before they are dropped.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);
/// Between two tries when allocator or engine fail.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Orphans removed at once.
const REAPERS: usize = 8;
/// Between SIGTERM and SIGKILL of an orphan.
const ORPHAN_GRACE: Duration = Duration::from_secs(2);

/// What all actors share.
pub(super) struct Controller {
    pub(super) config: Arc<Config>,
    pub(super) store: Store,
    pub(super) allocator: Arc<dyn Allocate>,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) catalog: Arc<Catalog>,
    pub(super) observer: Arc<dyn WorkloadObserver>,
    pub(super) clock: Arc<dyn Clock>,
    /// The allocator's leases and waits, as of its last change.
    pub(super) ledger: watch::Sender<Arc<Ledger>>,
    /// Counts how often the engine came back.
    pub(super) engine: watch::Sender<u64>,
    /// Everything ends in good order.
    pub(super) shutdown: CancellationToken,
    /// Everything ends now.
    killed: CancellationToken,
    tasks: TaskTracker,
    /// The workspaces that have something to do, by number.
    live: Mutex<HashMap<i64, Arc<Live>>>,
}

/// The rooms a controller works with.
pub(super) struct Parts {
    pub(super) config: Arc<Config>,
    pub(super) store: Store,
    pub(super) allocator: Arc<dyn Allocate>,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) catalog: Arc<Catalog>,
    pub(super) observer: Arc<dyn WorkloadObserver>,
    pub(super) clock: Arc<dyn Clock>,
}

/// Leases and waits by workload.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pub(super) leases: HashMap<String, Lease>,
    pub(super) waits: HashMap<String, Wait>,
}

impl Ledger {
    /// What became of a request, if it is here: it may be too new, or over.
    pub(super) fn state(&self, workload: &str) -> Option<LeaseState> {
        let lease = self.leases.get(workload).cloned().map(|lease| match lease.over {
            Some(reason) => LeaseState::Ended { reason },
            None => LeaseState::Granted(lease),
        });
        lease.or_else(|| self.waits.get(workload).cloned().map(LeaseState::Waiting))
    }
}

impl Controller {
    /// Takes over what the database says is active, and begins to work.
    pub(super) async fn start(parts: Parts) -> Result<Arc<Self>, StoreError> {
        let Parts { config, store, allocator, runtime, catalog, observer, clock } = parts;
        let controller = Arc::new(Self {
            config,
            store,
            allocator,
            runtime,
            catalog,
            observer,
            clock,
            ledger: watch::Sender::new(Arc::default()),
            engine: watch::Sender::new(0),
            shutdown: CancellationToken::new(),
            killed: CancellationToken::new(),
            tasks: TaskTracker::new(),
            live: Mutex::default(),
        });
        for record in controller.store.active_workspaces().await? {
            let user = controller.store.user_by_id(record.user_id).await?;
            info!(workload = %record.workload(), user = %record.user, state = ?record.life.name(), "taking over");
            controller.adopt(record, user);
        }
        let watched = Arc::clone(&controller);
        controller.spawn(async move { watched.watch_allocator().await });
        let watched = Arc::clone(&controller);
        let engine = controller.engine.subscribe();
        controller.spawn(async move { watched.reconcile(engine).await });
        controller.spawn(Arc::clone(&controller).watch_runtime());
        Ok(controller)
    }

    /// Ends every task. Containers go on.
    pub(super) async fn shut_down(&self) {
        self.shutdown.cancel();
        self.tasks.close();
        if tokio::time::timeout(SHUTDOWN_GRACE, self.tasks.wait()).await.is_err() {
            warn!("workspaces do not come to an end; dropping what they do");
            self.kill();
            self.tasks.wait().await;
        }
    }

    /// Ends every task when it is dropped.
    pub(super) fn drop_guard(&self) -> DropGuard {
        self.killed.clone().drop_guard()
    }

    /// Ends every task at once, as a crash would.
    pub(super) fn kill(&self) {
        self.shutdown.cancel();
        self.killed.cancel();
        self.tasks.close();
    }

    #[cfg(test)]
    pub(super) async fn killed(&self) {
        self.kill();
        self.tasks.wait().await;
    }

    #[cfg(test)]
    pub(super) fn actors(&self) -> usize {
        self.registry().len()
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let killed = self.killed.clone();
        self.tasks.spawn(async move {
            let _ = killed.run_until_cancelled_owned(task).await;
        });
    }

    fn registry(&self) -> MutexGuard<'_, HashMap<i64, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The workspace, if it has something to do.
    pub(super) fn live(&self, id: i64) -> Option<Arc<Live>> {
        self.registry().get(&id).cloned()
    }

    /// Joins a workspace, waking it if it is at rest.
    pub(super) fn join(
        self: &Arc<Self>,
        record: WorkspaceRecord,
        user: &UserRecord,
        choice: &Choice,
    ) -> Result<Joined, WorkspaceError> {
        let mut registry = self.registry();
        if self.shutdown.is_cancelled() {
            return Err(WorkspaceError::ShuttingDown);
        }
        if let Some(live) = registry.get(&record.id) {
            return live.join(choice);
        }
        let live = Live::new(record.clone(), user.clone(), Arc::clone(&self.clock), false);
        let joined = live.join(choice)?;
        registry.insert(record.id, Arc::clone(&live));
        drop(registry);
        self.spawn(Actor::new(Arc::clone(self), live).run());
        Ok(joined)
    }

    fn adopt(self: &Arc<Self>, record: WorkspaceRecord, user: UserRecord) {
        let id = record.id;
        let live = Live::new(record, user, Arc::clone(&self.clock), true);
        self.registry().insert(id, Arc::clone(&live));
        self.spawn(Actor::new(Arc::clone(self), live).run());
    }

    /// Forgets a workspace that is at rest; false if it is not any more.
    pub(super) fn retire(&self, live: &Live) -> bool {
        let mut registry = self.registry();
        let at_rest = live.at_rest();
        if at_rest {
            registry.remove(&live.record().id);
        }
        at_rest
    }

    /// Makes the user's home ready.
    pub(super) async fn make_home(&self, user: &UserRecord) -> Result<(), WorkspaceError> {
        let (config, user) = (Arc::clone(&self.config), user.clone());
        match tokio::task::spawn_blocking(move || files::ensure_home(&config, &user)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(WorkspaceError::Home(error.to_string())),
            Err(_) => Err(WorkspaceError::Internal),
        }
    }

    // ── News of the allocator ──

    /// Keeps the ledger up to date.
    async fn watch_allocator(&self) {
        let mut seen = 0;
        let mut delay = RETRY.0;
        loop {
            let news = async {
                let version = self.allocator.changed(seen).await?;
                // Waits first: a request granted in between is in both, and never in neither.
                let waits = self.allocator.waits().await?;
                let leases = self.allocator.leases().await?;
                Ok::<_, AllocatorError>((version, waits, leases))
            };
            match self.shutdown.run_until_cancelled(news).await {
                None => return,
                Some(Ok((version, waits, leases))) => {
                    seen = version;
                    delay = RETRY.0;
                    self.ledger.send_replace(Arc::new(Ledger {
                        leases: leases.into_iter().map(|lease| (lease.workload.clone(), lease)).collect(),
                        waits: waits.into_iter().map(|wait| (wait.workload.clone(), wait)).collect(),
                    }));
                }
                Some(Err(error)) => {
                    warn!(%error, ?delay, "no news of the allocator; asking again");
                    seen = 0;
                    if !self.sleep(delay).await {
                        return;
                    }
                    delay = delay.saturating_mul(2).min(RETRY.1);
                }
            }
        }
    }

    // ── News of the runtime ──

    /// Hands news of containers to their workspaces.
    async fn watch_runtime(self: Arc<Self>) {
        let mut events = self.runtime.events();
        while let Some(Some(event)) = self.shutdown.run_until_cancelled(events.next()).await {
            match event {
                RuntimeEvent::Resync => self.engine.send_modify(|count| *count = count.wrapping_add(1)),
                RuntimeEvent::Changed(workload) => self.changed(workload),
            }
        }
    }

    fn changed(self: &Arc<Self>, workload: String) {
        let Some((id, generation)) = parse_workload_name(&workload) else { return };
        if let Some(live) = self.live(id).filter(|live| live.record().life.generation == generation) {
            live.request_look();
            return;
        }
        let controller = Arc::clone(self);
        self.spawn(async move {
            // Most news of this kind is that of a container that has just been removed.
            if !matches!(controller.runtime.inspect(&workload).await, Ok(None)) {
                controller.reap(&workload).await;
            }
        });
    }

    /// Whenever the engine has come back, and at the beginning: compares what there is with what is wanted,
    /// until that succeeds.
    async fn reconcile(&self, mut engine: watch::Receiver<u64>) {
        let mut delay = RETRY.0;
        while let Some(Ok(())) = self.shutdown.run_until_cancelled(engine.changed()).await {
            while let Some(Err(error)) = self.shutdown.run_until_cancelled(self.compare()).await {
                warn!(%error, ?delay, "containers and leases cannot be compared with what is wanted; trying again");
                if !self.sleep(delay).await {
                    return;
                }
                delay = delay.saturating_mul(2).min(RETRY.1);
            }
            delay = RETRY.0;
        }
    }

    async fn compare(&self) -> Result<(), WorkspaceError> {
        let found = self.runtime.list().await?;
        self.look_after_lost(&found);
        let containers = found.into_iter().map(|found| found.name);
        let leases = self.allocator.leases().await?.into_iter().map(|lease| lease.workload);
        let waits = self.allocator.waits().await?.into_iter().map(|wait| wait.workload);
        let ours: BTreeSet<String> =
            containers.chain(leases).chain(waits).filter(|name| name.starts_with("w-")).collect();
        futures::stream::iter(ours)
            .for_each_concurrent(REAPERS, |workload| async move { self.reap(&workload).await })
            .await;
        Ok(())
    }

    /// Lets those look that should run and were not seen to.
    fn look_after_lost(&self, found: &[Found]) {
        let running: HashSet<&str> =
            found.iter().filter(|found| found.state == FoundState::Running).map(|found| found.name.as_str()).collect();
        for live in self.registry().values() {
            if !running.contains(live.record().workload().as_str()) {
                live.request_look();
            }
        }
    }

    /// Removes the container and gives back the lease of a workload that nobody wants.
    async fn reap(&self, workload: &str) {
        let result = async {
            if !self.unwanted(workload).await? {
                return Ok(());
            }
            info!(%workload, "nobody wants this workload; removing its container and lease");
            self.observer.gone(workload);
            self.runtime.remove(workload, ORPHAN_GRACE).await?;
            Ok::<_, WorkspaceError>(self.allocator.release(workload).await?)
        };
        if let Some(Err(error)) = self.shutdown.run_until_cancelled(result).await {
            warn!(%workload, %error, "a workload that nobody wants cannot be removed now");
        }
    }

    /// Whether a workload that was seen is none that a workspace is or will be. Generations only grow and a
    /// stopped one does not come back, so this is true for ever once it is.
    async fn unwanted(&self, workload: &str) -> Result<bool, StoreError> {
        let Some((id, generation)) = parse_workload_name(workload) else { return Ok(true) };
        let record = self.store.workspace_by_id(id).await?;
        Ok(record.is_none_or(|record| record.life.generation != generation || !record.life.active()))
    }

    /// False if the gateway is being shut down.
    async fn sleep(&self, delay: Duration) -> bool {
        let until = later(self.clock.now(), delay);
        self.shutdown.run_until_cancelled(self.clock.until(until)).await.is_some()
    }
}
