//! The controller of jobs: from an accepted submission to a result, through any crash.
//!
//! [`Jobs`] is what the API calls; [`Life`] is the state machine. Behind them `controller` turns news into
//! looks at jobs, `reconcile` is one such look, `lease` keeps the leases. Not here: who may see which job.

mod controller;
mod error;
mod giving_way;
mod lease;
mod log;
mod queue;
mod reconcile;
mod result;
mod spec;
mod state;
#[cfg(test)]
mod tests;
mod watcher;
mod workload;

pub use error::JobError;
pub use state::{AttemptName, Illegal, Life, NotAnAttempt, word};
pub use workload::{artifacts_folder, job_directory};

use crate::{
    config::Config,
    image::Catalog,
    quota::{could_allow, project_in_the_way, user_limits},
    runtime::{Runtime, WorkloadObserver},
    store::{JobFilter, JobRecord, Store, StoreError, Submission, UserRecord},
};
use bytes::Bytes;
use controller::Controller;
use futures::Stream;
use mlad::api::{Attempt, Job, JobId, JobReason, JobSpec, JobState, Need, Project, Reservation, WaitReason};
use mlad_allocator::{Allocate, AllocatorError};
use std::{sync::Arc, time::Duration};

/// Image and slice of whoever submits: taken where the submission names none.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// Image by catalog name.
    pub image: Option<String>,
    /// Slice.
    pub need: Option<Need>,
    /// The project it counts for.
    pub project: Option<String>,
}

/// The jobs of this installation.
#[derive(Clone)]
pub struct Jobs(Arc<Controller>);

impl Jobs {
    /// Takes up every job that has not ended and drives it from now on. Engine and allocator may be away:
    /// it goes on when they are back.
    ///
    /// # Errors
    /// When the database fails, or the kernel gives no inotify instance.
    pub async fn start(
        config: Arc<Config>,
        store: Store,
        allocator: Arc<dyn Allocate>,
        runtime: Arc<dyn Runtime>,
        catalog: Arc<Catalog>,
        observer: Arc<dyn WorkloadObserver>,
    ) -> Result<Self, JobError> {
        let controller = Controller::new(config, store, allocator, runtime, catalog, observer)?;
        controller.start().await?;
        Ok(Self(controller))
    }

    /// Ends the controller; jobs and their containers go on.
    pub async fn shutdown(&self) {
        self.0.stop.cancel();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    /// Accepts a job. When this returns it survives any crash.
    ///
    /// # Errors
    /// When the submission is malformed, can never fit, or would be one too many.
    pub async fn submit(&self, user: &UserRecord, mut spec: JobSpec, origin: Origin) -> Result<JobId, JobError> {
        let config = &self.0.config;
        let image = match spec.image.take().or(origin.image).or_else(|| config.workspace.default_image.clone()) {
            Some(image) => image,
            None => self.only_image(user).await?,
        };
        let entry = self.0.catalog.get_for(user, &image).await?;
        spec.image = Some(image);
        spec.need = spec
            .need
            .or(origin.need)
            .or_else(|| user.quota.default_need.clone())
            .or_else(|| config.workspace.default_need.clone());
        spec.project = self.project_of(user, spec.project.take(), origin.project).await?;
        let spec = spec::complete(spec, &config.job, &config.container)?;
        spec::check_priority(&spec, user)?;
        self.check_reservation(user, &spec).await?;
        self.check_fit(user, &spec, entry.min_gpu_memory_mib, &entry.name).await?;
        let most = user.quota.jobs.unwrap_or(u32::MAX).min(config.job.max_per_user);
        match self.0.store.submit_job(user.id, &spec, most).await? {
            Submission::New(id) => {
                tracing::info!(job = id, user = user.name, "a job was accepted");
                self.0.accept(id);
                Ok(id)
            }
            Submission::Same(id) => Ok(id),
            Submission::OtherCommand(id) => Err(JobError::KeyUsed(id)),
            Submission::TooMany(have) => Err(JobError::TooMany { have, most }),
        }
    }

    /// The image of a catalog that has but one for this user.
    async fn only_image(&self, user: &UserRecord) -> Result<String, JobError> {
        let mut entries = self.0.catalog.entries_for(&user.name, user.role).await?;
        match (entries.pop(), entries.is_empty()) {
            (Some(entry), true) => Ok(entry.name),
            _ => Err(JobError::NoImage),
        }
    }

    /// The project a job counts for: the one it names, else that of whoever sends it, else the user's default.
    async fn project_of(
        &self,
        user: &UserRecord,
        named: Option<String>,
        origin: Option<String>,
    ) -> Result<Option<String>, JobError> {
        let project = match named.or(origin) {
            Some(project) if project == Project::NONE => return Ok(None),
            Some(project) => project,
            None => return Ok(self.0.store.default_project(user.id).await?),
        };
        if self.0.store.is_member(user.id, &project).await? {
            Ok(Some(project))
        } else {
            Err(JobError::Project(project))
        }
    }

    /// Refuses a reservation that is not there, or is not for this user.
    async fn check_reservation(&self, user: &UserRecord, spec: &JobSpec) -> Result<(), JobError> {
        let Some(name) = &spec.reservation else { return Ok(()) };
        let refused = |text: String| Err(AllocatorError::Reservation(text).into());
        let found = self.0.allocator.reservations().await?.into_iter().find(|found| found.name == *name);
        let Some(found) = found.filter(|found| may_use(found, &user.name, &spec.project)) else {
            return refused(format!("there is no reservation {name} that you may use for this project"));
        };
        match &spec.need {
            None | Some(Need::Cpu) => refused(format!("a job without a GPU cannot use the reservation {}", found.name)),
            Some(_) => Ok(()),
        }
    }

    /// Refuses what could never start, so that nobody waits for it.
    async fn check_fit(&self, user: &UserRecord, spec: &JobSpec, image_mib: u64, image: &str) -> Result<(), JobError> {
        let need = spec.need.as_ref().unwrap_or(&Need::Cpu);
        let resolved = self.0.allocator.resolve(need).await?;
        if resolved.memory_mib < image_mib {
            return Err(JobError::Impossible(format!(
                "the image {image} needs {image_mib} MiB of GPU memory, and {need} has {}",
                resolved.memory_mib
            )));
        }
        if *need == Need::Cpu {
            return Ok(());
        }
        let slices = spec.slices.unwrap_or(1);
        let memory = resolved.memory_mib.saturating_mul(u64::from(slices));
        let what = if slices == 1 { need.to_string() } else { format!("{slices} times {need}") };
        if !could_allow(&user_limits(user), slices, memory) {
            return Err(JobError::OverQuota(format!("{what} is more than your quota allows")));
        }
        let Some(project) = &spec.project else { return Ok(()) };
        match project_in_the_way(&self.0.store, project, slices, memory).await? {
            None => Ok(()),
            Some(name) => {
                Err(JobError::OverQuota(format!("{what} is more than the limits of the project {name} allow")))
            }
        }
    }

    /// One job as it is stored: whose it is decides who may see it.
    ///
    /// # Errors
    /// When there is none of that number.
    pub async fn record(&self, id: JobId) -> Result<JobRecord, JobError> {
        Ok(self.0.store.job(id).await?)
    }

    /// A job as the API shows it.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn view(&self, record: JobRecord) -> Result<Job, JobError> {
        let attempts = self.0.store.attempts(&[record.id]).await?.remove(&record.id).unwrap_or_default();
        Ok(self.compose(record, attempts))
    }

    /// Jobs, newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn list(&self, filter: &JobFilter) -> Result<Vec<Job>, JobError> {
        let records = self.0.store.jobs(filter).await?;
        let ids: Vec<JobId> = records.iter().map(|record| record.id).collect();
        let mut attempts = self.0.store.attempts(&ids).await?;
        let compose = |record: JobRecord| {
            let attempts = attempts.remove(&record.id).unwrap_or_default();
            self.compose(record, attempts)
        };
        Ok(records.into_iter().map(compose).collect())
    }

    /// What is stored, and over it what is known of its wait.
    fn compose(&self, record: JobRecord, attempts: Vec<Attempt>) -> Job {
        let wait = if record.life.state == JobState::Queued { self.0.wait_of(record.next()) } else { None };
        let note =
            matches!(record.life.state, JobState::Queued | JobState::Starting).then(|| self.0.note_of(record.id));
        let (reason, detail) = match (&wait, note.flatten()) {
            (_, Some((reason, text))) => (reason.or(record.life.reason), Some(text)),
            (Some(wait), None) => (Some(reason_of(wait.reason)), Some(wait.detail.clone())),
            (None, None) => (record.life.reason, record.life.detail),
        };
        let directory = job_directory(&record.user, record.id).display().to_string();
        Job {
            id: record.id,
            user: record.user,
            name: record.name,
            state: record.life.state,
            reason,
            detail,
            spec: record.spec,
            submitted_at: record.submitted_at,
            started_at: record.life.started_at,
            ended_at: record.life.ended_at,
            exit_code: record.life.exit_code,
            signal: record.life.signal,
            attempts,
            place: wait.as_ref().map(|wait| wait.place),
            estimate: wait.and_then(|wait| wait.estimate),
            directory,
        }
    }

    /// Ends a job. One that is being cancelled, or was, is no error.
    ///
    /// # Errors
    /// When it has ended otherwise.
    pub async fn cancel(&self, id: JobId, by: &str) -> Result<JobRecord, JobError> {
        let done = |life: &Life| matches!(life.state, JobState::Cancelling | JobState::Cancelled);
        self.change(id, done, |life| life.cancelling(by)).await
    }

    /// Keeps a queued job from starting.
    ///
    /// # Errors
    /// When it is not queued (or held).
    pub async fn hold(&self, id: JobId) -> Result<JobRecord, JobError> {
        self.change(id, |life| life.state == JobState::Held, |life| life.held(None)).await
    }

    /// Lets a held job start.
    ///
    /// # Errors
    /// When it is not held (or queued).
    pub async fn release(&self, id: JobId) -> Result<JobRecord, JobError> {
        self.change(id, |life| life.state == JobState::Queued, Life::released).await
    }

    /// Takes a job's slice back: its attempt is ended, and the job held.
    ///
    /// # Errors
    /// When it has no slice.
    pub async fn revoke(&self, id: JobId, by: &str) -> Result<JobRecord, JobError> {
        let why = || format!("its slice was taken back by {by}");
        self.change(id, |_| false, |life| life.lost(JobReason::Held, why())).await
    }

    /// One wanted transition, repeated while the controller moves the job at the same time.
    async fn change(
        &self,
        id: JobId,
        done: impl Fn(&Life) -> bool,
        transition: impl Fn(&Life) -> Result<Life, Illegal>,
    ) -> Result<JobRecord, JobError> {
        loop {
            let record = self.0.store.job(id).await?;
            if done(&record.life) {
                // Whoever asks twice has seen nothing come of it.
                self.0.queue.add(id);
                return Ok(record);
            }
            let next = transition(&record.life).map_err(|illegal| JobError::illegal(id, &illegal))?;
            match self.0.store.change_job(id, &record.life, &next, None).await {
                Ok(()) => {
                    self.0.job_changed(id, next.state);
                    self.0.queue.add(id);
                    return Ok(JobRecord { life: next, ..record });
                }
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The job when it has ended or is not in the state `seen` any more, or as it is after `timeout`.
    ///
    /// # Errors
    /// When there is none of that number, or the gateway is ending.
    pub async fn wait(&self, id: JobId, seen: Option<JobState>, timeout: Duration) -> Result<JobRecord, JobError> {
        let mut news = self.0.watch(id);
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            let record = self.0.store.job(id).await?;
            if record.life.state.has_ended() || seen.is_some_and(|seen| seen != record.life.state) {
                return Ok(record);
            }
            tokio::select! {
                changed = news.changed() => if changed.is_err() { news = self.0.watch(id) },
                () = tokio::time::sleep_until(deadline) => return Ok(record),
                () = self.0.stop.cancelled() => return Err(JobError::Stopping),
            }
        }
    }

    /// A job's output from byte `offset`; with `follow` until the job has ended.
    ///
    /// # Errors
    /// When the log is there and cannot be read.
    pub async fn log(
        &self,
        owner: UserRecord,
        job: JobRecord,
        offset: u64,
        follow: bool,
    ) -> Result<impl Stream<Item = Result<Bytes, JobError>> + Send + use<>, JobError> {
        Ok(log::Follower::begin(Arc::clone(&self.0), owner, job, offset, follow).await?.stream())
    }

    /// A user's limits or memberships have changed: their queued jobs ask again under the new ones.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn limits_changed(&self, user_id: i64) -> Result<(), JobError> {
        let filter = JobFilter {
            user_id: Some(user_id),
            states: vec![JobState::Queued],
            before: None,
            limit: self.0.config.job.max_per_user,
        };
        for job in self.0.store.jobs(&filter).await? {
            self.0.queue.add(job.id);
        }
        Ok(())
    }
}

/// Whether a reservation is for a user, or for the project that a request counts for.
pub(crate) fn may_use(reservation: &Reservation, user: &str, project: &Option<String>) -> bool {
    let of_project = project.as_ref().is_some_and(|project| reservation.projects.contains(project));
    of_project || reservation.users.iter().any(|name| name == user)
}

fn reason_of(reason: WaitReason) -> JobReason {
    match reason {
        WaitReason::Priority => JobReason::Priority,
        WaitReason::NoSlice => JobReason::NoSlice,
        WaitReason::Quota => JobReason::Quota,
        WaitReason::Repartitioning => JobReason::Repartitioning,
        WaitReason::NodeUnavailable => JobReason::NodeUnavailable,
        WaitReason::Reserved => JobReason::Reserved,
    }
}
