//! What one workspace does: the actor that brings it from state to state.
//!
//! There is one actor for every workspace that is not at rest. It looks at the state in the database and does
//! what that state needs; everything it does can be done again, so that a crash anywhere is made good by
//! looking again. Nobody else writes the row of a workspace.

use super::{
    WorkspaceError,
    clock::{between, later},
    controller::{Controller, Ledger},
    live::{Live, Step},
    renewal::Renewal,
    spec::workload_spec,
    state::{Life, State, TransitionError},
};
use crate::{
    image::ImageError,
    quota::user_limits,
    runtime::{Ended, FoundState, RuntimeError, StartProgress},
    store::{StoreError, WorkspaceRecord},
};
use futures::FutureExt as _;
use jiff::Timestamp;
use mlad::api::{Lease, Wait};
use mlad_allocator::{AllocatorError, LeaseRequest, LeaseState};
use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};
use tokio::sync::watch;
use tracing::{Instrument as _, error, info, info_span, warn};

/// Between SIGTERM and SIGKILL when a workspace is stopped.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// How long a place in the queue is kept for those whose connection a restart of the gateway broke.
const PATIENCE: Duration = Duration::from_secs(60);
/// Shortest and longest time until something that failed is tried again, if nothing says earlier that it
/// may work now.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// The actor of one workspace.
pub(super) struct Actor {
    controller: Arc<Controller>,
    live: Arc<Live>,
    /// Until when a place in the queue that was taken over is kept.
    patience: Timestamp,
}

/// Why a step could not be done now. It is tried again.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Allocator(#[from] AllocatorError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Transition(#[from] TransitionError),
}

impl From<StepError> for WorkspaceError {
    fn from(error: StepError) -> Self {
        match error {
            StepError::Store(error) => error.into(),
            StepError::Allocator(error) => error.into(),
            StepError::Runtime(error) => error.into(),
            StepError::Transition(_) => Self::Internal,
        }
    }
}

/// What came of waiting for a slice.
enum Outcome {
    Granted(Box<Lease>),
    /// The request of this generation is over already, from before a restart.
    Stale,
    GivenUp(String),
    Failed(WorkspaceError),
}

impl Actor {
    pub(super) fn new(controller: Arc<Controller>, live: Arc<Live>) -> Self {
        let patience = later(controller.clock.now(), PATIENCE);
        Self { controller, live, patience }
    }

    /// Works until the workspace is at rest or the gateway is shut down. A panic is this workspace's alone.
    pub(super) async fn run(self) {
        let record = self.live.record();
        let span = info_span!("workspace", id = record.id, user = %record.user, name = %record.name);
        let work = async {
            let mut failures = 0;
            loop {
                match AssertUnwindSafe(self.step_or_shutdown()).catch_unwind().await {
                    Ok(Some(Ok(()))) => failures = 0,
                    Ok(Some(Err(error))) => {
                        warn!(%error, failures, "a step cannot be done now; it is tried again");
                        self.live.fail(&error.into());
                        failures += 1;
                        self.pause(failures).await;
                    }
                    Ok(None) => break,
                    Err(_) => {
                        error!("the actor of this workspace panicked; it begins again");
                        self.live.fail(&WorkspaceError::Internal);
                        failures += 1;
                        self.pause(failures).await;
                    }
                }
            }
        };
        work.instrument(span).await;
    }

    /// One step; none when there is nothing more to do. A container's start is not broken off: what the
    /// engine has been told to do it may do later than we look.
    async fn step_or_shutdown(&self) -> Option<Result<(), StepError>> {
        let shutdown = &self.controller.shutdown;
        if shutdown.is_cancelled() {
            self.live.fail(&WorkspaceError::ShuttingDown);
            return None;
        }
        if self.live.at_rest() && self.controller.retire(&self.live) {
            return None;
        }
        let step = self.step();
        if matches!(self.live.record().life.state, State::Starting { .. }) {
            return Some(step.await);
        }
        let result = shutdown.run_until_cancelled(step).await;
        if result.is_none() {
            self.live.fail(&WorkspaceError::ShuttingDown);
        }
        result
    }

    async fn step(&self) -> Result<(), StepError> {
        match self.live.record().life.state {
            State::Stopped { .. } => self.begin().await,
            State::Waiting => Box::pin(self.obtain_slice()).await,
            State::Starting { fence } => Box::pin(self.start_container(fence)).await,
            State::Running { fence, .. } => Box::pin(self.look_after(fence)).await,
            State::Stopping { detail, .. } => self.clear_away(&detail).await,
        }
    }

    /// Waits until something may have become possible that was not.
    async fn pause(&self, failures: u32) {
        let exponent = failures.saturating_sub(1).min(8);
        let delay = RETRY.0.saturating_mul(1 << exponent).min(RETRY.1);
        let mut engine = self.controller.engine.subscribe();
        tokio::select! {
            () = self.controller.clock.until(later(self.controller.clock.now(), delay)) => {}
            _ = engine.changed() => {}
            () = self.live.woken() => {}
            () = self.controller.shutdown.cancelled() => {}
        }
    }

    /// Writes a transition.
    async fn save(&self, change: impl FnOnce(&Life) -> Result<Life, TransitionError>) -> Result<(), StepError> {
        let before = self.live.record();
        let after = WorkspaceRecord { life: change(&before.life)?, ..before.clone() };
        self.save_record(&before, after).await
    }

    async fn save_record(&self, before: &WorkspaceRecord, after: WorkspaceRecord) -> Result<(), StepError> {
        match self.controller.store.save_workspace(before, &after).await {
            Ok(()) => {
                if before.life.name() != after.life.name() {
                    info!(from = ?before.life.name(), to = ?after.life.name(), generation = after.life.generation, "transition");
                }
                self.live.set_record(after);
                Ok(())
            }
            Err(StoreError::Conflict(reason)) => self.reload(reason).await,
            Err(error) => Err(error.into()),
        }
    }

    /// The row is not what it was thought to be: whoever changed it is right.
    async fn reload(&self, reason: String) -> Result<(), StepError> {
        let record = self.live.record();
        match self.controller.store.workspace_by_id(record.id).await? {
            Some(record) => {
                warn!(%reason, "the row was changed by somebody else; going on from what it says");
                self.live.set_record(record);
                Ok(())
            }
            None => {
                let life = Life { generation: record.life.generation, state: State::Stopped { detail: None } };
                self.live.set_record(WorkspaceRecord { life, ..record });
                self.live.fail(&WorkspaceError::Stopped("it was forgotten".into()));
                Ok(())
            }
        }
    }

    // ── Stopped ──

    async fn begin(&self) -> Result<(), StepError> {
        let Some(choice) = self.live.next_choice() else { return Ok(()) };
        let before = self.live.record();
        let after = WorkspaceRecord {
            image: choice.image,
            need: choice.need,
            project: choice.project,
            life: before.life.begin()?,
            ..before.clone()
        };
        self.save_record(&before, after).await
    }

    // ── Waiting ──

    async fn obtain_slice(&self) -> Result<(), StepError> {
        let outcome = tokio::select! {
            biased;
            reason = self.given_up() => Outcome::GivenUp(reason),
            outcome = self.slice() => outcome,
        };
        match outcome {
            Outcome::Granted(lease) => {
                let fence = lease.fence;
                info!(workload = %lease.workload, fence, profile = %lease.profile, uuids = ?lease.uuids, "lease granted");
                self.live.set_lease(*lease);
                self.live.report(Step::Starting);
                self.save(|life| life.granted(fence)).await
            }
            Outcome::Stale => self.save(|life| life.give_up(None)).await,
            Outcome::GivenUp(reason) => {
                self.controller.allocator.release(&self.live.record().workload()).await?;
                info!(%reason, "the place in the queue is given back");
                self.save(|life| life.give_up(Some(reason))).await
            }
            Outcome::Failed(error) => {
                warn!(%error, "no slice for this workspace; those who wait are told");
                self.abort(&error);
                Ok(())
            }
        }
    }

    /// Returns, with the reason, when nobody wants this generation any more.
    async fn given_up(&self) -> String {
        loop {
            if let Some(reason) = self.live.given_up(self.patience) {
                return reason;
            }
            let now = self.controller.clock.now();
            tokio::select! {
                () = self.live.woken() => {}
                () = self.controller.clock.until(self.patience), if now < self.patience => {}
            }
        }
    }

    /// The image first, so that nobody holds a slice while it is fetched; then the slice.
    async fn slice(&self) -> Outcome {
        let record = self.live.record();
        if let Err(error) = self.pinned_image(&record).await {
            return Outcome::Failed(error);
        }
        // Not as it was when somebody first came: the last limits that are told count.
        let user = match self.controller.store.user_by_id(record.user_id).await {
            Ok(user) => user,
            Err(error) => return Outcome::Failed(error.into()),
        };
        let request = LeaseRequest {
            limits: user_limits(&user),
            idle_seconds: self.controller.config.workspace.unused_gpu_minutes.map(|most| u64::from(most.get()) * 60),
            project: record.project.clone(),
            ..LeaseRequest::new(record.workload(), &record.user, record.need.clone())
        };
        // Subscribed before the request, so that no news of it is missed.
        let mut ledger = self.controller.ledger.subscribe();
        ledger.mark_unchanged();
        let mut state = match self.controller.allocator.request(&request).await {
            Ok(state) => state,
            Err(AllocatorError::Ended(_)) => return Outcome::Stale,
            Err(error) => return Outcome::Failed(error.into()),
        };
        loop {
            match state {
                LeaseState::Granted(lease) => return Outcome::Granted(Box::new(lease)),
                LeaseState::Ended { reason } => return Outcome::Failed(WorkspaceError::Lease(reason)),
                LeaseState::Waiting(wait) => {
                    self.live.report(Step::Waiting(wait.clone()));
                    state = match self.news(&mut ledger, &wait).await {
                        Ok(state) => state,
                        Err(error) => return Outcome::Failed(error.into()),
                    };
                }
            }
        }
    }

    /// What the next change makes of a request that waits. While the allocator cannot be reached, the place is
    /// kept.
    async fn news(&self, ledger: &mut watch::Receiver<Arc<Ledger>>, wait: &Wait) -> Result<LeaseState, AllocatorError> {
        let workload = &wait.workload;
        loop {
            if ledger.changed().await.is_err() {
                return std::future::pending().await;
            }
            let seen = Arc::clone(&ledger.borrow_and_update());
            match seen.state(workload) {
                Some(LeaseState::Waiting(now)) if now == *wait => continue,
                Some(state) => return Ok(state),
                None => {}
            }
            match self.controller.allocator.state(workload).await {
                Err(error @ (AllocatorError::Unreachable { .. } | AllocatorError::Store(_))) => {
                    warn!(%error, "the allocator does not say what became of the request; waiting on");
                }
                result => return result,
            }
        }
    }

    async fn pinned_image(&self, record: &WorkspaceRecord) -> Result<String, WorkspaceError> {
        let entry = self.controller.catalog.get_for(&self.live.user, &record.image).await.map_err(image_error)?;
        let progress = |progress: StartProgress| self.report(progress);
        Ok(self.controller.runtime.resolve_image(&entry.reference, &progress).await?)
    }

    fn report(&self, progress: StartProgress) {
        self.live.report(match progress {
            StartProgress::Pulling(done, total) => Step::Pulling(done, total),
            StartProgress::Creating | StartProgress::Connecting => Step::Starting,
        });
    }

    /// Ends this generation and tells those who wait why.
    fn abort(&self, error: &WorkspaceError) {
        self.live.fail(error);
        self.live.decide_stop(error.to_string());
    }

    // ── Starting ──

    async fn start_container(&self, fence: u64) -> Result<(), StepError> {
        if let Some(reason) = self.live.stop_reason() {
            return self.save(|life| life.stop(reason)).await;
        }
        let Some(lease) = self.lease(fence).await? else {
            self.abort(&WorkspaceError::Lease("it ended before the container was started".into()));
            return Ok(());
        };
        match self.launch(lease).await {
            Ok(()) => {}
            Err(error) => {
                warn!(%error, "the container cannot be started; those who wait are told");
                self.abort(&error);
                return Ok(());
            }
        }
        if self.live.started() {
            self.live.decide_stop("nobody waits for it any more");
            return Ok(());
        }
        let now = self.controller.clock.now();
        self.save(|life| life.started(now)).await
    }

    /// The lease of this generation; none if it is over.
    async fn lease(&self, fence: u64) -> Result<Option<Lease>, StepError> {
        if let Some(lease) = self.live.lease().filter(|lease| lease.fence == fence) {
            return Ok(Some(lease));
        }
        match self.controller.allocator.renew(&self.live.record().workload(), fence).await {
            Ok(lease) => {
                self.live.set_lease(lease.clone());
                Ok(Some(lease))
            }
            Err(AllocatorError::Ended(_) | AllocatorError::Fence(_) | AllocatorError::Unknown(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Starts the container, to the end of it, keeping its lease meanwhile.
    async fn launch(&self, lease: Lease) -> Result<(), WorkspaceError> {
        let record = self.live.record();
        let image = self.pinned_image(&record).await?;
        self.live.report(Step::Starting);
        self.controller.make_home(&self.live.user).await?;
        let spec = workload_spec(&self.controller.config, &record, &self.live.user, &lease, &image);
        let progress = |progress: StartProgress| self.report(progress);
        let start = self.controller.runtime.start(&spec, &progress);
        tokio::pin!(start);
        let mut renewal = Renewal::new(&lease, self.controller.clock.now());
        loop {
            tokio::select! {
                result = &mut start => return Ok(result?),
                () = self.controller.clock.until(renewal.due()) => {
                    if let Some(reason) = self.renew(&mut renewal, &spec.name, spec.fence).await {
                        self.abort(&WorkspaceError::Lease(reason));
                    }
                }
            }
        }
    }

    /// Renews the lease; returns why it is over, if it is.
    async fn renew(&self, renewal: &mut Renewal, workload: &str, fence: u64) -> Option<String> {
        let result = self.controller.allocator.renew(workload, fence).await;
        let now = self.controller.clock.now();
        match result {
            Ok(lease) => {
                *renewal = Renewal::new(&lease, now);
                self.live.set_lease(lease);
                None
            }
            Err(error @ (AllocatorError::Ended(_) | AllocatorError::Fence(_) | AllocatorError::Unknown(_))) => {
                Some(self.why_ended(workload).await.unwrap_or_else(|| error.to_string()))
            }
            Err(error) => {
                renewal.failed(now);
                warn!(%error, "the lease cannot be renewed now; it is tried again");
                None
            }
        }
    }

    /// Looks whether the lease is over, as the allocator's last news has it, or as it says itself if that
    /// news does not tell.
    async fn heed(&self, workload: &str, news: Option<LeaseState>) {
        let reason = match news {
            Some(LeaseState::Granted(lease)) => {
                self.live.set_lease(lease);
                None
            }
            Some(LeaseState::Ended { reason }) => Some(lease_over(&reason)),
            Some(LeaseState::Waiting(_)) | None => self.why_ended(workload).await,
        };
        if let Some(reason) = reason {
            self.live.decide_stop(reason);
        }
    }

    /// What the allocator says of the end of a lease; none if it is not over, as far as is known.
    async fn why_ended(&self, workload: &str) -> Option<String> {
        match self.controller.allocator.state(workload).await {
            Ok(LeaseState::Ended { reason }) => Some(lease_over(&reason)),
            Err(error @ AllocatorError::Unknown(_)) => Some(error.to_string()),
            Ok(LeaseState::Waiting(_)) => Some("its lease is over".to_owned()),
            Ok(LeaseState::Granted(_)) | Err(_) => None,
        }
    }

    // ── Running ──

    async fn look_after(&self, fence: u64) -> Result<(), StepError> {
        if let Some(reason) = self.live.stop_reason() {
            return self.save(|life| life.stop(reason)).await;
        }
        let workload = self.live.record().workload();
        let Some(lease) = self.lease(fence).await? else {
            self.live.decide_stop("its lease was over when the gateway came back");
            return Ok(());
        };
        if !self.live.runs() && !self.take_over(&workload).await? {
            return Ok(());
        }
        let mut renewal = Renewal::new(&lease, self.controller.clock.now());
        let mut ledger = self.controller.ledger.subscribe();
        let idle = self.idle();
        while self.live.stop_reason().is_none() {
            self.note_presence(idle).await?;
            let deadline = self.live.idle_deadline(idle);
            tokio::select! {
                () = self.live.woken() => if self.live.take_look() { self.look(&workload).await },
                () = self.controller.clock.until(deadline.unwrap_or(Timestamp::MAX)), if deadline.is_some() => {
                    self.live.stop_if_idle(idle, deadline.unwrap_or(Timestamp::MAX), &self.idle_reason());
                }
                () = self.controller.clock.until(renewal.due()) => {
                    if let Some(reason) = self.renew(&mut renewal, &workload, fence).await {
                        self.live.decide_stop(reason);
                    }
                }
                Ok(()) = ledger.changed() => {
                    let known = ledger.borrow_and_update().state(&workload);
                    self.heed(&workload, known).await;
                }
            }
        }
        Ok(())
    }

    /// Makes it enterable: at once after its start, or when it is seen to run after a restart of the gateway.
    async fn take_over(&self, workload: &str) -> Result<bool, StepError> {
        if !self.live.started_here()
            && let Some(reason) = self.why_not_running(workload).await?
        {
            self.live.decide_stop(reason);
            return Ok(false);
        }
        self.controller.observer.running(workload, &self.live.user.name);
        self.live.ready();
        Ok(true)
    }

    /// Writes down when it is to be stopped, whenever that has changed, and the wish to keep it.
    async fn note_presence(&self, idle: Duration) -> Result<(), StepError> {
        if let Some(until) = self.live.take_keep() {
            let result = self.save(|life| life.keep(until)).await;
            if result.is_err() {
                self.live.request_keep(until);
                return result;
            }
        }
        let deadline = self.live.idle_deadline(idle);
        match self.live.record().life.state {
            State::Running { idle_deadline, .. } if idle_deadline != deadline => {
                self.save(|life| life.idle(deadline)).await
            }
            _ => Ok(()),
        }
    }

    /// The runtime has news: has the container ended? If the engine does not say, it will have news again.
    async fn look(&self, workload: &str) {
        match self.why_not_running(workload).await {
            Ok(Some(reason)) => self.live.decide_stop(reason),
            Ok(None) => {}
            Err(error) => warn!(%error, "the runtime does not say whether the container runs"),
        }
    }

    async fn why_not_running(&self, workload: &str) -> Result<Option<String>, RuntimeError> {
        let found = self.controller.runtime.inspect(workload).await?;
        Ok(match found.map(|found| found.state) {
            Some(FoundState::Running) => None,
            Some(FoundState::Ended(ended)) if ended.out_of_memory => {
                Some(format!("its container ran out of memory (exit code {})", ended.exit_code))
            }
            Some(FoundState::Ended(Ended { taken_away: Some(why), .. })) => Some(format!("it was taken away ({why})")),
            Some(FoundState::Ended(ended)) => Some(format!("its container ended (exit code {})", ended.exit_code)),
            Some(FoundState::Created) | None => Some("its container is gone".to_owned()),
        })
    }

    fn idle(&self) -> Duration {
        Duration::from_secs(self.controller.config.workspace.idle_minutes.saturating_mul(60))
    }

    fn idle_reason(&self) -> String {
        format!("nobody was connected for {} minutes", self.controller.config.workspace.idle_minutes)
    }

    // ── Stopping ──

    async fn clear_away(&self, reason: &str) -> Result<(), StepError> {
        let workload = self.live.record().workload();
        self.controller.observer.gone(&workload);
        self.live.end_instance(reason);
        self.live.report(Step::Stopping);
        let began = self.controller.clock.now();
        self.controller.runtime.remove(&workload, STOP_GRACE).await?;
        // Only now is the container proven gone.
        self.controller.allocator.release(&workload).await?;
        let took = between(began, self.controller.clock.now());
        info!(%workload, %reason, ?took, "container removed, lease given back");
        self.save(Life::stopped).await
    }
}

fn lease_over(reason: &str) -> String {
    format!("its lease is over: {reason}")
}

/// What is wrong with the image, for a person.
pub(super) fn image_error(error: ImageError) -> WorkspaceError {
    match error {
        ImageError::Store(error) => error.into(),
        ImageError::Runtime(error) => error.into(),
        error => WorkspaceError::Image(error.to_string()),
    }
}
