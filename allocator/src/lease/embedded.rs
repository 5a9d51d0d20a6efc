//! The allocator in this process.

use super::{
    engine::{Clock, Command, Engine, Reply},
    ledger::Ledger,
    record::Now,
    store::{Reader, Store},
    usage::{self, Used, date, day_number, day_of},
};
use crate::{
    Account, AccountState, Allocate, AllocatorError, LeaseRequest, LeaseState, Resolved,
    node::{Driver, DriverError, Node, NvmlDriver},
    placement::{Objective, PolicyName},
    queue::{Backfill, Rules},
    remote::{Hub, NodeSettings},
};
use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp, civil::Date};
use mlad::api::{GpuMap, Lease, Need, NewReservation, NodeInfo, Past, Reservation, UsageList, Wait};
use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, TryLockError},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// How the allocator runs in this process.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The SQLite database, made if it is not there. Only one allocator can use it at a time.
    pub database: PathBuf,
    /// The name of this machine, in leases and the map.
    pub node: String,
    /// Where the GPUs come from.
    pub gpus: Gpus,
    /// How long a lease lasts unless it is renewed. Renew it three times as often.
    pub lease: Duration,
    /// What decides where a slice is placed.
    pub policy: PolicyName,
    /// What is to be as many as possible.
    pub objective: Objective,
    /// How those who wait are served.
    pub queue: QueueSettings,
    /// How daemons of other machines are heard; none if there are no others.
    pub nodes: Option<NodeSettings>,
}

/// How those who wait are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueSettings {
    /// Whether those behind somebody who waits for space are served.
    pub backfill: Backfill,
    /// After so long, GPU time that was used counts half in the fair share.
    pub half_life: Duration,
    /// Who has waited for so long is ahead of everybody who has not.
    pub patience: Duration,
    /// How long before its end a lease that gives way, or whose GPU time is used up, is told.
    pub notice: Duration,
}

impl Default for QueueSettings {
    fn default() -> Self {
        Self {
            backfill: Backfill::default(),
            half_life: Duration::from_secs(7 * 86_400),
            patience: Duration::from_secs(3 * 86_400),
            notice: Duration::from_secs(60),
        }
    }
}

impl QueueSettings {
    pub(super) fn rules(self) -> Rules {
        let signed = |duration| SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
        Rules { backfill: self.backfill, patience: signed(self.patience), notice: signed(self.notice) }
    }
}

/// Where the GPUs come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gpus {
    /// The system's NVML (`libnvidia-ml.so.1`).
    System,
    /// The NVML at this path; a simulated one, say.
    Library(PathBuf),
    /// None: only `cpu` can be asked for.
    None,
}

impl Settings {
    /// The usual lease.
    pub const LEASE: Duration = Duration::from_secs(60);

    /// The usual settings: the system's GPUs, leases of 60 s.
    pub fn new(database: impl Into<PathBuf>, node: impl Into<String>) -> Self {
        let (policy, objective, queue) = Default::default();
        let (database, node) = (database.into(), node.into());
        Self { database, node, gpus: Gpus::System, lease: Self::LEASE, policy, objective, queue, nodes: None }
    }
}

/// Commands that may wait for the engine.
const COMMANDS: usize = 4096;
/// Reports of GPUs that may wait for the engine.
const REPORTS: usize = 256;
/// What daemons say that may wait for the engine.
const EVENTS: usize = 1024;
/// How long the start waits for the GPUs to answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the end may take in all; what it does in order, each part bounded, takes less.
const END: Duration = Duration::from_secs(30);

/// The allocator in this process: a handle on the task that does it all. The task ends with [`Self::stop`],
/// or, unfinished business left to the next start, when the handle is dropped.
pub struct Embedded {
    commands: mpsc::Sender<Command>,
    version: watch::Receiver<u64>,
    stop: CancellationToken,
    task: Mutex<Option<JoinHandle<()>>>,
    hub: Option<Hub>,
    past: Reader,
    clock: Clock,
}

pub(super) type Opener = Box<dyn Fn() -> Result<Arc<dyn Driver>, DriverError> + Send>;

impl Embedded {
    /// Starts the allocator: opens its database, agrees with the driver, and is ready.
    ///
    /// Without a driver it starts all the same, grants `cpu` only, and looks for the driver again.
    ///
    /// # Errors
    /// [`AllocatorError::Settings`] when another allocator uses the database, [`AllocatorError::Store`] when
    /// it cannot be opened.
    pub async fn start(settings: Settings) -> Result<Arc<Self>, AllocatorError> {
        let open = |library: Option<PathBuf>| -> Opener {
            Box::new(move || Ok(Arc::new(NvmlDriver::open(library.as_deref())?) as Arc<dyn Driver>))
        };
        let opener = match &settings.gpus {
            Gpus::System => Some(open(None)),
            Gpus::Library(path) => Some(open(Some(path.clone()))),
            Gpus::None => None,
        };
        let lock = lock(&settings.database)?;
        let store = Store::open(&settings.database).await?;
        Self::start_with(settings, opener, store, lock, system_clock()).await
    }

    pub(super) async fn start_with(
        settings: Settings,
        opener: Option<Opener>,
        store: Store,
        lock: File,
        clock: Clock,
    ) -> Result<Arc<Self>, AllocatorError> {
        let past = Reader::new(&settings.database);
        let (commands, receiver) = mpsc::channel(COMMANDS);
        let (report, reports) = mpsc::channel(REPORTS);
        // Versions of an earlier run are never met again: they begin with the time.
        let first = u64::try_from(clock().wall.as_microsecond()).unwrap_or(1);
        let (sender, version) = watch::channel(first);
        let node = opener.map(|open| Node::start(open, report)).transpose();
        let (event, events) = mpsc::channel(EVENTS);
        let node_lease = settings.nodes.as_ref().map_or(crate::remote::LEASE, |nodes| nodes.lease);
        let mut engine = Engine {
            ledger: Ledger::new(settings.node, settings.lease)
                .with(settings.policy.policy(settings.objective))
                .queued_by(settings.queue)
                .with_node_lease(node_lease)
                .with_boot(crate::remote::boot()?),
            store,
            _lock: lock,
            node: node.map_err(|error| AllocatorError::Driver(error.to_string()))?,
            reports,
            commands: receiver,
            nodes: settings.nodes.is_some().then_some(events),
            links: HashMap::new(),
            version: sender,
            clock: Arc::clone(&clock),
            broken: None,
            hold_until: None,
            outlook: None,
        };
        // Nodes have to be heard before their leases run out.
        engine.begin(PATIENCE.min(node_lease / 3)).await?;
        let stop = CancellationToken::new();
        let hub = match settings.nodes {
            Some(nodes) => Some(Hub::start(nodes, event, stop.clone()).await?),
            None => None,
        };
        let task = tokio::spawn(engine.run(stop.clone()));
        Ok(Arc::new(Self { commands, version, stop, task: Mutex::new(Some(task)), hub, past, clock }))
    }

    /// Ends the allocator: what is under way is finished and written down, as far as that takes no longer than
    /// half a minute. What runs under leases is not touched.
    pub async fn stop(&self) {
        self.stop.cancel();
        let Some(mut task) = self.task.lock().await.take() else { return };
        match timeout(END, &mut task).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => tracing::error!("the allocator ended by panic"),
            Err(_) => {
                tracing::error!("the allocator does not come to its end; it is cut off, as a kill would do it");
                task.abort();
            }
        }
    }

    /// Where daemons of other machines are heard, if they are.
    pub fn nodes_address(&self) -> Option<SocketAddr> {
        self.hub.as_ref().map(|hub| hub.address)
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, AllocatorError> {
        let (reply, answer) = oneshot::channel();
        let gone = || AllocatorError::Unreachable { url: "embedded".to_owned(), reason: "it has stopped".to_owned() };
        self.commands.send(command(reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Ends it as a kill would: nothing is finished, nothing more is written.
    #[cfg(test)]
    pub(super) async fn kill(&self) {
        if let Some(task) = self.task.lock().await.take() {
            task.abort();
            drop(task.await);
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[async_trait]
impl Allocate for Embedded {
    async fn resolve(&self, need: &Need) -> Result<Resolved, AllocatorError> {
        let need = need.clone();
        self.ask(|reply| Command::Resolve(need, reply)).await
    }

    async fn request(&self, request: &LeaseRequest) -> Result<LeaseState, AllocatorError> {
        let request = Box::new(request.clone());
        self.ask(|reply| Command::Request(request, reply)).await
    }

    async fn state(&self, workload: &str) -> Result<LeaseState, AllocatorError> {
        let workload = workload.to_owned();
        self.ask(|reply| Command::State(workload, reply)).await
    }

    async fn renew(&self, workload: &str, fence: u64) -> Result<Lease, AllocatorError> {
        let workload = workload.to_owned();
        self.ask(|reply| Command::Renew(workload, fence, reply)).await
    }

    async fn release(&self, workload: &str) -> Result<(), AllocatorError> {
        let workload = workload.to_owned();
        self.ask(|reply| Command::Release(workload, reply)).await
    }

    async fn revoke(&self, workload: &str, reason: &str, free: bool) -> Result<(), AllocatorError> {
        let (workload, reason) = (workload.to_owned(), reason.to_owned());
        self.ask(|reply| Command::Revoke { workload, reason, free, reply }).await
    }

    async fn leases(&self) -> Result<Vec<Lease>, AllocatorError> {
        self.ask(Command::Leases).await
    }

    async fn waits(&self) -> Result<Vec<Wait>, AllocatorError> {
        self.ask(Command::Waits).await
    }

    async fn map(&self) -> Result<GpuMap, AllocatorError> {
        self.ask(Command::Map).await
    }

    async fn set_accounts(&self, accounts: &[Account]) -> Result<(), AllocatorError> {
        let accounts = accounts.to_vec();
        self.ask(|reply| Command::SetAccounts(accounts, reply)).await
    }

    async fn accounts(&self) -> Result<Vec<AccountState>, AllocatorError> {
        self.ask(Command::Accounts).await
    }

    async fn nodes(&self) -> Result<Vec<NodeInfo>, AllocatorError> {
        self.ask(Command::Nodes).await
    }

    async fn forget_node(&self, node: &str) -> Result<(), AllocatorError> {
        let node = node.to_owned();
        self.ask(|reply| Command::ForgetNode(node, reply)).await
    }

    async fn past(&self, at: Timestamp) -> Result<Past, AllocatorError> {
        self.past.past(at).await
    }

    async fn usage(&self, from: Date, to: Date) -> Result<UsageList, AllocatorError> {
        let now = (self.clock)().wall;
        let kept_since = date(day_of(now) - usage::KEPT_DAYS + 1)?;
        let [first, last] = [from, to].map(day_number);
        if last < first || last - first >= usage::KEPT_DAYS {
            let most = usage::KEPT_DAYS;
            return Err(AllocatorError::Invalid(format!("from {from} to {to} is no span of 1 to {most} days")));
        }
        let mut days: BTreeMap<_, Used> = BTreeMap::new();
        for row in self.past.used([first, last], now).await? {
            days.entry((row.day, row.user.clone(), row.project.clone())).or_default().add(&row);
        }
        let told = |((day, user, project), used): ((i32, Arc<str>, Option<Arc<str>>), Used)| {
            Ok::<_, AllocatorError>(used.told(date(day)?, &user, project.as_deref()))
        };
        Ok(UsageList { from, to, kept_since, usage: days.into_iter().map(told).collect::<Result<_, _>>()? })
    }

    async fn trust_gpu(&self, gpu: &str) -> Result<(), AllocatorError> {
        let gpu = gpu.to_owned();
        self.ask(|reply| Command::TrustGpu(gpu, reply)).await
    }

    async fn reserve(&self, new: &NewReservation) -> Result<Reservation, AllocatorError> {
        let new = Box::new(new.clone());
        self.ask(|reply| Command::Reserve(new, reply)).await
    }

    async fn cancel_reservation(&self, name: &str) -> Result<(), AllocatorError> {
        let name = name.to_owned();
        self.ask(|reply| Command::CancelReservation(name, reply)).await
    }

    async fn reservations(&self) -> Result<Vec<Reservation>, AllocatorError> {
        self.ask(Command::Reservations).await
    }

    async fn changed(&self, seen: u64) -> Result<u64, AllocatorError> {
        let mut version = self.version.clone();
        let changed = version.wait_for(|version| *version != seen).await;
        changed.map(|version| *version).map_err(|_| AllocatorError::Unreachable {
            url: "embedded".to_owned(),
            reason: "it has stopped".to_owned(),
        })
    }
}

/// Makes sure that no other allocator uses the database: two would grant the same slices.
pub(super) fn lock(database: &Path) -> Result<File, AllocatorError> {
    let mut name = database.as_os_str().to_owned();
    name.push(".lock");
    let wrong = |why: String| AllocatorError::Settings(format!("{}: {why}", Path::new(&name).display()));
    let file = File::options().create(true).append(true).open(&name).map_err(|error| wrong(error.to_string()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(wrong("another allocator uses this database; stop it first".to_owned())),
        Err(TryLockError::Error(error)) => Err(wrong(error.to_string())),
    }
}

pub(super) fn system_clock() -> Clock {
    let start = Instant::now();
    Arc::new(move || Now {
        // Microseconds, as they are stored: what is told before and after a restart is the same.
        wall: Timestamp::from_microsecond(Timestamp::now().as_microsecond()).unwrap_or(Timestamp::UNIX_EPOCH),
        steady: start.elapsed(),
    })
}
