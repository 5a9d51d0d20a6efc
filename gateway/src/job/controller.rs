//! What drives jobs: news from the runtime, the allocator and the API become entries of one queue, and
//! workers look at one job each (`reconcile`). Nothing here is needed after a crash: all is found again.

use super::{
    lease::Keeper,
    queue::{Looked, WorkQueue},
    reconcile::Fault,
    result,
    state::{AttemptName, Life},
    watcher::Watcher,
};
use crate::{
    config::Config,
    image::Catalog,
    runtime::{Runtime, RuntimeEvent, WorkloadObserver},
    store::{JobFilter, Store, StoreError},
};
use futures::StreamExt as _;
use mlad::api::{Ending, JobId, JobReason, JobState, Lease, Need, Wait};
use mlad_allocator::{Allocate, AllocatorError};
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Mutex as AsyncMutex, Notify, Semaphore, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

/// Jobs looked at at once. Most of a look is waiting for engine and allocator.
const WORKERS: usize = 256;
/// Containers started at once: more would only wait for each other at the engine.
const STARTS: usize = 8;
/// Pause before the allocator is asked again after it could not be reached.
const ALLOCATOR_PAUSE: Duration = Duration::from_secs(1);
/// First and longest pause before it is looked again for what no job wants, after a look that failed.
const SWEEP_PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Everything the controller works with.
pub(super) struct Controller {
    pub(super) config: Arc<Config>,
    pub(super) store: Store,
    pub(super) allocator: Arc<dyn Allocate>,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) catalog: Arc<Catalog>,
    pub(super) observer: Arc<dyn WorkloadObserver>,
    pub(super) queue: WorkQueue,
    pub(super) keeper: Keeper,
    pub(super) starts: Semaphore,
    /// Held by whoever writes the result of a job.
    pub(super) results: Arc<Semaphore>,
    /// Held by who asks the allocator for the first time: jobs line up in the order of their numbers.
    pub(super) lane: AsyncMutex<()>,
    pub(super) watcher: Arc<Watcher>,
    /// What the allocator says of those who wait, by workload.
    pub(super) waits: watch::Sender<HashMap<String, Wait>>,
    /// What runs may have changed unseen.
    resync: Notify,
    /// Ends everything below.
    pub(super) stop: CancellationToken,
    /// Every task of the controller.
    pub(super) tasks: TaskTracker,
    memory: Mutex<Memory>,
}

/// What is remembered and could as well be found again. At most one entry of each kind a live job.
#[derive(Default)]
struct Memory {
    /// Jobs for which the allocator has not been asked yet.
    unplaced: BTreeSet<JobId>,
    /// Jobs without a GPU that have a container, or are about to.
    cpu_running: HashSet<JobId>,
    /// Jobs without a GPU that wait until fewer of their kind run.
    cpu_waiting: BTreeSet<JobId>,
    /// Jobs whose request waits at the allocator.
    awaiting: HashSet<JobId>,
    /// Why a queued or starting job gets no further, or what it is at.
    notes: HashMap<JobId, (Option<JobReason>, String)>,
    /// When an attempt was told to end.
    terminated: HashMap<AttemptName, Instant>,
    /// Attempts whose lease is going to end.
    endings: HashMap<AttemptName, Ending>,
    /// Who waits for news of a job.
    watchers: HashMap<JobId, watch::Sender<()>>,
}

impl Controller {
    pub(super) fn new(
        config: Arc<Config>,
        store: Store,
        allocator: Arc<dyn Allocate>,
        runtime: Arc<dyn Runtime>,
        catalog: Arc<Catalog>,
        observer: Arc<dyn WorkloadObserver>,
    ) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            config,
            store,
            allocator,
            runtime,
            catalog,
            observer,
            queue: WorkQueue::default(),
            keeper: Keeper::default(),
            starts: Semaphore::new(STARTS),
            results: Arc::new(Semaphore::new(result::AT_ONCE)),
            lane: AsyncMutex::new(()),
            watcher: Watcher::new()?,
            waits: watch::Sender::default(),
            resync: Notify::new(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            memory: Mutex::default(),
        }))
    }

    /// Puts every job that has not ended into the queue and starts the tasks.
    pub(super) async fn start(self: &Arc<Self>) -> Result<(), StoreError> {
        let under_way = JobFilter { states: Life::WITH_ATTEMPT.to_vec(), limit: u32::MAX, ..JobFilter::default() };
        for job in self.store.jobs(&under_way).await?.iter().filter(|job| job.spec.need == Some(Need::Cpu)) {
            self.memory().cpu_running.insert(job.id);
        }
        for id in self.store.live_jobs().await? {
            self.accept(id);
        }
        let this = Arc::clone(self);
        self.spawn(async move { this.work().await });
        let this = Arc::clone(self);
        self.spawn(async move { this.follow_runtime().await });
        let this = Arc::clone(self);
        self.spawn(async move { this.keep_swept().await });
        let this = Arc::clone(self);
        self.spawn(async move { this.follow_allocator().await });
        let this = Arc::clone(self);
        self.spawn(async move { this.keeper.run(Arc::clone(&this.allocator), &this.queue).await });
        let this = Arc::clone(self);
        self.spawn(async move {
            if let Err(error) = this.watcher.run().await {
                tracing::error!(%error, "logs cannot be watched any more; followers see news of their job only");
            }
        });
        Ok(())
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            stop.run_until_cancelled(task).await;
        });
    }

    /// Takes up a job that was just stored, or was found in the database.
    pub(super) fn accept(&self, id: JobId) {
        self.memory().unplaced.insert(id);
        self.queue.add(id);
    }

    async fn add_all(&self) -> Result<(), StoreError> {
        for id in self.store.live_jobs().await? {
            self.queue.add(id);
        }
        Ok(())
    }

    async fn work(self: Arc<Self>) {
        let workers = Arc::new(Semaphore::new(WORKERS));
        loop {
            let Ok(permit) = Arc::clone(&workers).acquire_owned().await else { return };
            let (id, poke) = self.queue.next().await;
            let this = Arc::clone(&self);
            self.spawn(async move {
                let span = tracing::info_span!("job", id);
                let looked = match this.reconcile(id, &poke).instrument(span).await {
                    Ok(at) => Looked::Rest(at),
                    Err(fault) => {
                        this.report(id, &fault);
                        Looked::Failed
                    }
                };
                this.queue.done(id, &looked);
                drop(permit);
            });
        }
    }

    /// A look that failed: it is repeated, so it is the operator's concern, and a note for the user.
    fn report(&self, id: JobId, fault: &Fault) {
        tracing::warn!(job = id, error = %fault, "a job cannot go on now; trying again");
        self.note(id, Some(JobReason::NodeUnavailable), fault.to_string());
    }

    async fn follow_runtime(&self) {
        let mut events = self.runtime.events();
        while let Some(event) = events.next().await {
            match event {
                RuntimeEvent::Changed(name) => {
                    if let Ok(name) = name.parse::<AttemptName>() {
                        self.queue.add(name.job);
                    }
                }
                RuntimeEvent::Resync => {
                    self.queue.forgive();
                    self.resync.notify_one();
                }
            }
        }
    }

    /// Compares what runs with what is wanted whenever that is in doubt, and again until it has succeeded:
    /// nothing else finds what no job wants.
    async fn keep_swept(&self) {
        let (shortest, longest) = SWEEP_PAUSE;
        loop {
            self.resync.notified().await;
            let mut pause = shortest;
            while let Err(error) = self.sweep_and_look().await {
                tracing::warn!(%error, ?pause, "what runs could not be compared with what is wanted; trying again");
                tokio::select! {
                    () = tokio::time::sleep(pause) => pause = (pause * 2).min(longest),
                    () = self.resync.notified() => {}
                }
            }
        }
    }

    async fn sweep_and_look(&self) -> Result<(), Fault> {
        let swept = self.sweep().await;
        // Also if that failed: these jobs may be able to go on.
        self.add_all().await?;
        swept
    }

    /// Ends containers and leases of attempts that nobody wants any more. Those of jobs that have not come to
    /// their end are left to `reconcile`.
    async fn sweep(&self) -> Result<(), Fault> {
        // In this order: an attempt is written down before it has a lease in force and a container.
        let containers = self.runtime.list().await?;
        let leases = self.allocator.leases().await?;
        let waits = self.allocator.waits().await?;
        let mut gone = HashSet::new();
        for name in containers.iter().filter_map(|found| attempt_of(&found.name)) {
            if !self.wants(name, false).await? {
                tracing::info!(workload = %name, "ending a container that no job wants");
                self.runtime.remove(&name.to_string(), Duration::ZERO).await?;
                self.observer.gone(&name.to_string());
                gone.insert(name);
            }
        }
        let held = leases.iter().map(|lease| &lease.workload).chain(waits.iter().map(|wait| &wait.workload));
        for name in held.filter_map(|workload| attempt_of(workload)) {
            if !self.wants(name, true).await? {
                if !gone.contains(&name) {
                    self.runtime.remove(&name.to_string(), Duration::ZERO).await?;
                }
                tracing::info!(workload = %name, "giving back a lease or place that no job wants");
                self.allocator.release(&name.to_string()).await?;
            }
        }
        Ok(())
    }

    /// Whether a job may need the container, or the lease, of this name.
    async fn wants(&self, name: AttemptName, lease: bool) -> Result<bool, Fault> {
        let job = match self.store.job(name.job).await {
            Ok(job) => job,
            Err(StoreError::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let coming = lease && job.next() == name && matches!(job.life.state, JobState::Queued | JobState::Cancelling);
        Ok(coming || (job.life.has_attempt() && job.current() == Some(name)))
    }

    async fn follow_allocator(&self) {
        let mut seen = 0;
        loop {
            let news = match self.allocator.changed(seen).await {
                Ok(version) => self.waits_and_leases().await.map(|(waits, leases)| (version, waits, leases)),
                Err(error) => Err(error),
            };
            match news {
                Ok((version, waits, leases)) => {
                    seen = version;
                    self.take_endings(leases);
                    self.take_waits(waits);
                }
                Err(error) => {
                    tracing::warn!(%error, "the allocator says nothing; trying again");
                    tokio::time::sleep(ALLOCATOR_PAUSE).await;
                }
            }
        }
    }

    async fn waits_and_leases(&self) -> Result<(Vec<Wait>, Vec<Lease>), AllocatorError> {
        Ok((self.allocator.waits().await?, self.allocator.leases().await?))
    }

    /// Keeps which leases are going to end; jobs that have notice, or not any more, go into the queue.
    fn take_endings(&self, leases: Vec<Lease>) {
        let ending = |lease: Lease| Some((attempt_of(&lease.workload)?, lease.ending?));
        let endings: HashMap<AttemptName, Ending> = leases.into_iter().filter_map(ending).collect();
        let mut memory = self.memory();
        let before = std::mem::replace(&mut memory.endings, endings);
        let names: HashSet<AttemptName> = before.keys().chain(memory.endings.keys()).copied().collect();
        let changed: Vec<JobId> = names
            .into_iter()
            .filter(|name| before.get(name) != memory.endings.get(name))
            .map(|name| name.job)
            .collect();
        drop(memory);
        for id in changed {
            self.queue.add(id);
        }
    }

    /// The notice that the lease of an attempt has.
    pub(super) fn ending_of(&self, name: AttemptName) -> Option<Ending> {
        self.memory().endings.get(&name).cloned()
    }

    /// Keeps what is said of those who wait; jobs that wait no longer go into the queue.
    fn take_waits(&self, waits: Vec<Wait>) {
        let waits: HashMap<String, Wait> = waits.into_iter().map(|wait| (wait.workload.clone(), wait)).collect();
        let waiting: HashSet<JobId> = waits.keys().filter_map(|name| attempt_of(name)).map(|name| name.job).collect();
        self.waits.send_replace(waits);
        let moved: Vec<JobId> = self.memory().awaiting.iter().filter(|id| !waiting.contains(id)).copied().collect();
        for id in moved {
            self.queue.add(id);
        }
    }

    /// The allocator is about to be asked for this job: news of it matter from now on.
    pub(super) fn await_grant(&self, id: JobId) {
        self.memory().awaiting.insert(id);
    }

    /// The first job up to this one for which the allocator has not been asked yet.
    pub(super) fn first_unplaced(&self, up_to: JobId) -> Option<JobId> {
        self.memory().unplaced.range(..=up_to).next().copied()
    }

    pub(super) fn placed(&self, id: JobId) {
        self.memory().unplaced.remove(&id);
    }

    /// Takes one of the places of jobs without a GPU; if there is none for it now, it is woken when there is.
    pub(super) fn cpu_slot(&self, id: JobId) -> bool {
        let most = self.most_without_gpu();
        let mut memory = self.memory();
        let before = memory.cpu_waiting.range(..id).count();
        let taken = memory.cpu_running.contains(&id) || memory.cpu_running.len() + before < most;
        if taken {
            memory.cpu_running.insert(id);
            memory.cpu_waiting.remove(&id);
        } else if memory.cpu_waiting.insert(id) {
            memory.tell(id);
        }
        // Of places that became free at once, each woke the same one: whoever takes one wakes the next.
        let next = memory.next_without_gpu(most);
        drop(memory);
        if let Some(next) = next {
            self.queue.add(next);
        }
        taken
    }

    fn most_without_gpu(&self) -> usize {
        usize::try_from(self.config.job.max_without_gpu).unwrap_or(usize::MAX)
    }

    /// What the allocator says of a workload that waits.
    pub(super) fn wait_of(&self, name: AttemptName) -> Option<Wait> {
        self.waits.borrow().get(&name.to_string()).cloned()
    }

    /// Why a job gets no further, or what it is at.
    pub(super) fn note_of(&self, id: JobId) -> Option<(Option<JobReason>, String)> {
        let memory = self.memory();
        if memory.cpu_waiting.contains(&id) {
            let (most, before) = (self.most_without_gpu(), memory.cpu_waiting.range(..id).count());
            let text = format!("{most} jobs without a GPU run at once, and {before} more wait before it");
            return Some((Some(JobReason::Priority), text));
        }
        memory.notes.get(&id).cloned()
    }

    pub(super) fn note(&self, id: JobId, reason: Option<JobReason>, text: String) {
        let mut memory = self.memory();
        let note = (reason, text);
        if memory.notes.get(&id) != Some(&note) {
            memory.notes.insert(id, note);
            memory.tell(id);
        }
    }

    /// When the attempt was told to end; now, if it was not before.
    pub(super) fn terminated(&self, name: AttemptName) -> Option<Instant> {
        self.memory().terminated.get(&name).copied()
    }

    pub(super) fn set_terminated(&self, name: AttemptName) {
        self.memory().terminated.insert(name, Instant::now());
    }

    /// Forgets an attempt that is proven gone.
    pub(super) fn forget(&self, name: AttemptName) {
        self.keeper.let_go(name);
        self.memory().terminated.remove(&name);
        self.observer.gone(&name.to_string());
    }

    /// A job has changed: whoever waits for that is woken, and what was remembered of it is out of date.
    pub(super) fn job_changed(&self, id: JobId, state: JobState) {
        let most = self.most_without_gpu();
        let mut memory = self.memory();
        memory.notes.remove(&id);
        if !Life::WITH_ATTEMPT.contains(&state) {
            memory.cpu_running.remove(&id);
        }
        if state != JobState::Queued {
            memory.awaiting.remove(&id);
            memory.unplaced.remove(&id);
            memory.cpu_waiting.remove(&id);
        }
        let next = memory.next_without_gpu(most);
        memory.tell(id);
        if state.has_ended() {
            memory.watchers.remove(&id);
        } else {
            memory.watchers.retain(|_, watcher| watcher.receiver_count() > 0);
        }
        drop(memory);
        if let Some(next) = next {
            self.queue.add(next);
        }
    }

    /// News of a job, from now on.
    pub(super) fn watch(&self, id: JobId) -> watch::Receiver<()> {
        self.memory().watchers.entry(id).or_default().subscribe()
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Memory {
    /// Who is to be woken for a place without a GPU, if there is one.
    fn next_without_gpu(&self, most: usize) -> Option<JobId> {
        self.cpu_waiting.first().copied().filter(|_| self.cpu_running.len() < most)
    }

    /// Wakes whoever waits for news of a job.
    fn tell(&self, id: JobId) {
        if let Some(watcher) = self.watchers.get(&id) {
            watcher.send_replace(());
        }
    }
}

fn attempt_of(workload: &str) -> Option<AttemptName> {
    workload.parse().ok()
}
