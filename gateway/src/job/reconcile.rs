//! One look at one job: compares what is wanted with what is, and does the next thing. Every step can be
//! repeated, and a crash between any two is a look that begins anew.

use super::{controller::Controller, lease::Standing, state::AttemptName, state::Illegal, workload::workload};
use crate::{
    files,
    image::ImageError,
    quota::user_limits,
    runtime::{Ended, FoundState, RuntimeError, StartProgress},
    store::{JobRecord, StoreError, UserRecord},
};
use jiff::Timestamp;
use mlad::{
    api::{JobId, JobReason, JobState, Lease, Need},
    channel::{Exit, JobResult},
};
use mlad_allocator::{AllocatorError, LeaseRequest, LeaseState};
use std::{pin::pin, sync::Arc, time::Duration};
use tokio::{sync::Notify, time::Instant};

/// Time beyond the grace until a container that was told to end is ended from outside.
const SLACK: Duration = Duration::from_secs(10);

/// Why a look failed; it is repeated.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Allocator(#[from] AllocatorError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Files(#[from] files::FilesError),
    #[error(transparent)]
    Illegal(#[from] Illegal),
    #[error("a task was ended: {0}")]
    Task(#[from] tokio::task::JoinError),
    #[error("the result of a job cannot be put into words: {0}")]
    Json(#[from] serde_json::Error),
}

/// What a step came to.
pub(super) enum Step {
    /// The job changed: look again.
    Again,
    /// Nothing to do until something happens, or until this time.
    Rest(Option<Instant>),
}

impl Controller {
    /// Looks at a job until there is nothing to do now. `poke` says that something happened meanwhile.
    pub(super) async fn reconcile(&self, id: JobId, poke: &Notify) -> Result<Option<Instant>, Fault> {
        loop {
            let job = match self.store.job(id).await {
                Ok(job) => job,
                Err(StoreError::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            let step = match job.life.state {
                JobState::Held | JobState::Blocked => self.give_back_place(&job).await,
                JobState::Queued => self.step_queued(&job).await,
                JobState::Starting => self.step_starting(&job, poke).await,
                JobState::Running => self.step_running(&job).await,
                JobState::Collecting => self.step_collecting(&job).await,
                JobState::Lost => self.step_lost(&job).await,
                JobState::Cancelling => self.step_cancelling(&job).await,
                JobState::Succeeded | JobState::Failed | JobState::Cancelled => {
                    // Not by this look, perhaps: who waits for it may not have heard.
                    self.job_changed(id, job.life.state);
                    return Ok(None);
                }
            };
            match step {
                Ok(Step::Again) => {}
                Ok(Step::Rest(at)) => return Ok(at),
                // Somebody else (the API) moved it first.
                Err(Fault::Store(StoreError::Conflict(_))) => {}
                Err(fault) => return Err(fault),
            }
        }
    }

    async fn give_back_place(&self, job: &JobRecord) -> Result<Step, Fault> {
        self.allocator.release(&job.next().to_string()).await?;
        Ok(Step::Rest(None))
    }

    async fn step_queued(&self, job: &JobRecord) -> Result<Step, Fault> {
        if job.life.reason == Some(JobReason::Held) {
            // Its slice was taken back (see `revoke`): the second half of that.
            return self.change(job, job.life.held(job.life.detail.clone())?, None).await;
        }
        if let Some(project) = &job.spec.project
            && !self.store.is_member(job.user_id, project).await?
        {
            let detail =
                format!("{} is no member of the project {project} any more; cancel it, or ask to be", job.user);
            return self.change(job, job.life.held(Some(detail))?, None).await;
        }
        if let Some(at) = self.pause(job).await? {
            return Ok(Step::Rest(Some(at)));
        }
        if job.spec.need == Some(Need::Cpu) {
            // The allocator lets everybody in who needs no GPU: here is who sees that the machine bears it.
            if !self.cpu_slot(job.id) {
                return Ok(Step::Rest(None));
            }
        } else {
            self.line_up(job.id).await?;
        }
        match self.request(job).await? {
            Ok(LeaseState::Waiting(_)) => Ok(Step::Rest(None)),
            Ok(LeaseState::Granted(lease)) => self.change(job, job.life.granted()?, Some(&lease)).await,
            Ok(LeaseState::Ended { .. }) | Err(AllocatorError::Ended(_)) => {
                self.change(job, job.life.renumbered()?, None).await
            }
            // It could fit when it was accepted: a GPU is missing. News of the GPUs bring it here again.
            Err(AllocatorError::Impossible(text)) => {
                self.note(job.id, Some(JobReason::NodeUnavailable), text);
                Ok(Step::Rest(None))
            }
            // The user's quota was made smaller: a change of it brings it here again.
            Err(AllocatorError::Quota(text)) => {
                self.note(job.id, Some(JobReason::Quota), text);
                Ok(Step::Rest(None))
            }
            // It was there when the job was accepted: it is over, was removed, or is not for them any more.
            Err(AllocatorError::Reservation(text)) => {
                let detail = format!("{text}; cancel it, and hand it in again without or for another one");
                self.change(job, job.life.held(Some(detail))?, None).await
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Asks for every job up to this one for which nobody asked yet: who came first is first in line, though
    /// jobs are looked at all at once.
    async fn line_up(&self, id: JobId) -> Result<(), Fault> {
        if self.first_unplaced(id).is_none() {
            return Ok(());
        }
        let _lane = self.lane.lock().await;
        while let Some(first) = self.first_unplaced(id) {
            let job = self.store.job(first).await?;
            let asks = job.life.state == JobState::Queued && job.spec.need != Some(Need::Cpu);
            if asks && self.pause(&job).await?.is_none() {
                use AllocatorError::{Ended, Impossible, Quota, Reservation};
                match self.request(&job).await? {
                    Ok(_) | Err(Ended(_) | Impossible(_) | Quota(_) | Reservation(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            self.placed(first);
        }
        Ok(())
    }

    async fn request(&self, job: &JobRecord) -> Result<Result<LeaseState, AllocatorError>, StoreError> {
        let user = self.store.user_by_id(job.user_id).await?;
        self.await_grant(job.id);
        Ok(self.allocator.request(&lease_request(job, &user)).await)
    }

    /// Until when the job is left alone after a fault of the machine: longer each time.
    async fn pause(&self, job: &JobRecord) -> Result<Option<Instant>, Fault> {
        if job.life.reason != Some(JobReason::Infrastructure) {
            return Ok(None);
        }
        let attempts = self.store.attempts(&[job.id]).await?.remove(&job.id).unwrap_or_default();
        let Some(ended_at) = attempts.last().and_then(|attempt| attempt.ended_at) else { return Ok(None) };
        let failed = attempts.iter().filter(|attempt| !attempt.preempted).count();
        let times = u32::try_from(failed).unwrap_or(u32::MAX).saturating_sub(1).min(16);
        let pause = Duration::from_secs(self.config.job.retry_seconds).saturating_mul(1 << times);
        let passed = Duration::try_from(Timestamp::now().duration_since(ended_at)).unwrap_or_default();
        let left = pause.saturating_sub(passed);
        Ok(if left.is_zero() { None } else { Instant::now().checked_add(left) })
    }

    async fn step_starting(&self, job: &JobRecord, poke: &Notify) -> Result<Step, Fault> {
        let Some(name) = job.current() else { return self.fault(job, "it has no attempt".into()).await };
        let lease = self.store.lease_of(name).await?;
        let standing = self.keeper.keep(name, &lease);
        if let Some(ending) = self.ending_of(name) {
            return self.give_way_unstarted(job, name, &ending).await;
        }
        if let Some(why) = in_doubt(standing) {
            return self.lose(job, why).await;
        }
        // A container of that name is this attempt, whoever started it.
        match self.runtime.inspect(&name.to_string()).await? {
            Some(found) if found.state != FoundState::Created => {}
            _ => {
                if let Some(step) = self.start_container(job, &lease, poke).await? {
                    return Ok(step);
                }
            }
        }
        tracing::info!(job = job.id, workload = %name, fence = lease.fence, "a job runs");
        self.change(job, job.life.started(Timestamp::now())?, None).await
    }

    /// Starts the container; none when it runs (or has run), else what became of the job.
    async fn start_container(&self, job: &JobRecord, lease: &Lease, poke: &Notify) -> Result<Option<Step>, Fault> {
        let user = self.store.user_by_id(job.user_id).await?;
        let image = job.spec.image.clone().unwrap_or_default();
        let entry = match self.catalog.get(&image).await {
            Ok(entry) => entry,
            Err(error @ ImageError::Unknown { .. }) => {
                return self.fail(job, JobReason::Image, error.to_string()).await.map(Some);
            }
            Err(error) => return Err(error.into()),
        };
        let progress = |progress: StartProgress| self.note(job.id, None, progress_in_words(&progress));
        let pinned = {
            let mut pull = pin!(self.runtime.resolve_image(&entry.reference, &progress));
            loop {
                tokio::select! {
                    pinned = &mut pull => break pinned,
                    () = poke.notified() => if self.has_moved(job).await? { return Ok(Some(Step::Again)) },
                }
            }
        };
        let pinned = match pinned {
            Ok(pinned) => pinned,
            Err(error @ RuntimeError::Image { .. }) => {
                return self.fail(job, JobReason::Image, error.to_string()).await.map(Some);
            }
            Err(error) => return Err(error.into()),
        };
        let config = Arc::clone(&self.config);
        let owner = user.clone();
        tokio::task::spawn_blocking(move || files::ensure_home(&config, &owner)).await??;
        let _permit = self.starts.acquire().await;
        if self.has_moved(job).await? {
            return Ok(Some(Step::Again));
        }
        match self.runtime.start(&workload(&self.config, job, &user, lease, pinned), &progress).await {
            Ok(()) => Ok(None),
            Err(error @ RuntimeError::Unavailable(_)) => Err(error.into()),
            Err(error @ RuntimeError::Image { .. }) => {
                self.fail(job, JobReason::Image, error.to_string()).await.map(Some)
            }
            Err(error) => self.fault(job, error.to_string()).await.map(Some),
        }
    }

    async fn step_running(&self, job: &JobRecord) -> Result<Step, Fault> {
        let Some(name) = job.current() else { return self.fault(job, "it has no attempt".into()).await };
        let lease = self.store.lease_of(name).await?;
        let standing = self.keeper.keep(name, &lease);
        let noticed = job.life.reason == Some(JobReason::Preempted) || self.ending_of(name).is_some();
        // One whose time is up has been told to end already.
        if noticed && job.life.reason != Some(JobReason::TimeLimit) {
            return self.give_way(job, name, &lease).await;
        }
        if let Some(why) = in_doubt(standing) {
            return self.lose(job, why).await;
        }
        let overdue = job.life.reason == Some(JobReason::TimeLimit);
        match self.runtime.inspect(&name.to_string()).await?.map(|found| found.state) {
            Some(FoundState::Running) => {
                self.observer.running(&name.to_string(), &job.user);
                self.mind_the_time(job, name, overdue).await
            }
            Some(FoundState::Ended(ended)) => self.collect(job, name, &ended).await,
            // It did not end by itself and had to be ended.
            None if overdue => self.change(job, job.life.killed(None)?, None).await,
            Some(FoundState::Created) | None => self.fault(job, "its container is gone".into()).await,
        }
    }

    pub(super) async fn mind_the_time(&self, job: &JobRecord, name: AttemptName, overdue: bool) -> Result<Step, Fault> {
        let limit = job.spec.time_limit_seconds.unwrap_or(u64::MAX);
        if overdue {
            return self.end_in_time(name, job.spec.preemptible).await;
        }
        let ran = Timestamp::now().duration_since(job.life.started_at.unwrap_or(job.submitted_at));
        let ran = Duration::try_from(ran).unwrap_or_default();
        match Duration::from_secs(limit).checked_sub(ran) {
            Some(left) if !left.is_zero() => Ok(Step::Rest(Instant::now().checked_add(left))),
            _ => self.change(job, job.life.overdue(limit)?, None).await,
        }
    }

    /// Tells the attempt to end; if it has not within its grace, ends it from outside. The agent of one that is
    /// not preemptible does that itself, and is given some time more.
    async fn end_in_time(&self, name: AttemptName, preemptible: bool) -> Result<Step, Fault> {
        let grace =
            Duration::from_secs(self.config.job.grace_seconds) + if preemptible { Duration::ZERO } else { SLACK };
        let Some(told) = self.terminated(name) else {
            self.runtime.terminate(&name.to_string()).await?;
            self.set_terminated(name);
            return Ok(Step::Rest(Some(Instant::now() + grace)));
        };
        if told.elapsed() < grace {
            return Ok(Step::Rest(Some(told + grace)));
        }
        tracing::warn!(workload = %name, "it does not end when told to; ending it");
        self.runtime.remove(&name.to_string(), Duration::ZERO).await?;
        Ok(Step::Again)
    }

    /// The container ended: its result becomes the job's verdict, before the container is removed.
    pub(super) async fn collect(&self, job: &JobRecord, name: AttemptName, ended: &Ended) -> Result<Step, Fault> {
        let memory = job.spec.memory_mib.unwrap_or(self.config.container.memory_mib);
        let result = self.runtime.result(&name.to_string()).await?;
        // The engine may not know it yet, or the agent not have lived to say it.
        let out_of_memory = (ended.out_of_memory || result.as_ref().is_some_and(|result| result.out_of_memory))
            .then(|| format!("the {memory} MiB of memory of its container were used up; ask for more with --memory"));
        let overdue = job.life.reason == Some(JobReason::TimeLimit);
        // What was taken away has not failed; what had ended before that has ended.
        let by_itself = matches!(result, Some(JobResult { exit: Exit::Status(_), .. }));
        if let Some(why) = ended.taken_away.as_ref().filter(|_| !overdue && !by_itself) {
            return self.fault(job, format!("its container was taken away ({why})")).await;
        }
        let next = match (result, ended.exit_code) {
            (Some(result), _) => job.life.ended(&result.exit, out_of_memory)?,
            (None, _) if out_of_memory.is_some() || overdue => job.life.killed(out_of_memory)?,
            // The agent ends as its command did, and never with 0 of its own.
            (None, 0) => job.life.ended(&Exit::Status(0), None)?,
            (None, code) => {
                return self.fault(job, format!("its container ended with {code} and left no result")).await;
            }
        };
        self.change(job, next, None).await
    }

    async fn step_collecting(&self, job: &JobRecord) -> Result<Step, Fault> {
        if let Some(name) = job.current() {
            self.end_attempt(name).await?;
        }
        let next = job.life.settled(Timestamp::now())?;
        tracing::info!(job = job.id, state = ?next.state, reason = ?next.reason, "a job ended");
        self.change(job, next, None).await
    }

    async fn step_lost(&self, job: &JobRecord) -> Result<Step, Fault> {
        let Some(name) = job.current() else { return self.fault(job, "it has no attempt".into()).await };
        if job.life.reason == Some(JobReason::Held) {
            self.end_attempt(name).await?;
            let detail = job.life.detail.clone().unwrap_or_default();
            return self.change(job, job.life.requeued(JobReason::Held, detail)?, None).await;
        }
        let lease = self.store.lease_of(name).await?;
        match self.keeper.keep(name, &lease) {
            Standing::Unasked | Standing::Doubtful => Ok(Step::Rest(None)),
            Standing::Over => self.fault(job, job.life.detail.clone().unwrap_or_default()).await,
            Standing::Kept => match self.runtime.inspect(&name.to_string()).await?.map(|found| found.state) {
                Some(FoundState::Running | FoundState::Ended(_)) => {
                    self.change(job, job.life.returned(Timestamp::now())?, None).await
                }
                Some(FoundState::Created) | None => self.fault(job, "its container is gone".into()).await,
            },
        }
    }

    async fn step_cancelling(&self, job: &JobRecord) -> Result<Step, Fault> {
        if let Some(name) = job.current() {
            let found = self.runtime.inspect(&name.to_string()).await?.map(|found| found.state);
            if found == Some(FoundState::Running)
                && let Step::Rest(at) = self.end_in_time(name, job.spec.preemptible).await?
            {
                return Ok(Step::Rest(at));
            }
            self.end_attempt(name).await?;
        }
        self.allocator.release(&job.next().to_string()).await?;
        tracing::info!(job = job.id, by = job.life.cancelled_by, "a job was cancelled");
        self.change(job, job.life.cancelled(Timestamp::now())?, None).await
    }

    /// starting, running → lost.
    async fn lose(&self, job: &JobRecord, why: &str) -> Result<Step, Fault> {
        tracing::warn!(job = job.id, attempt = job.life.attempt, why, "a job is lost");
        self.change(job, job.life.lost(JobReason::Infrastructure, why.into())?, None).await
    }

    /// The machine's fault or ours: proves the attempt dead, then queues the job again, unless it was often
    /// enough.
    async fn fault(&self, job: &JobRecord, why: String) -> Result<Step, Fault> {
        if let Some(name) = job.current() {
            self.end_attempt(name).await?;
        }
        let attempts = self.store.attempts(&[job.id]).await?.remove(&job.id).unwrap_or_default();
        let attempts = attempts.iter().filter(|attempt| !attempt.preempted).count();
        tracing::warn!(job = job.id, attempts, why, "an attempt failed for no fault of its job");
        if u32::try_from(attempts).is_ok_and(|attempts| attempts < self.config.job.max_attempts) {
            return self.change(job, job.life.requeued(JobReason::Infrastructure, why)?, None).await;
        }
        if job.life.state == JobState::Running {
            // Its lease is given back, so the next look takes it from there.
            return self.change(job, job.life.lost(JobReason::Infrastructure, why)?, None).await;
        }
        let why = format!("{why}; {attempts} attempts were made");
        self.change(job, job.life.failed(JobReason::Infrastructure, why, Timestamp::now())?, None).await
    }

    /// starting → failed: another attempt would end the same way.
    async fn fail(&self, job: &JobRecord, reason: JobReason, why: String) -> Result<Step, Fault> {
        if let Some(name) = job.current() {
            self.end_attempt(name).await?;
        }
        self.change(job, job.life.failed(reason, why, Timestamp::now())?, None).await
    }

    /// Proves that no container of the attempt is left, then gives its lease back.
    pub(super) async fn end_attempt(&self, name: AttemptName) -> Result<(), Fault> {
        let workload = name.to_string();
        self.runtime.remove(&workload, Duration::ZERO).await?;
        self.forget(name);
        self.allocator.release(&workload).await?;
        Ok(())
    }

    async fn has_moved(&self, job: &JobRecord) -> Result<bool, Fault> {
        let life = self.store.job(job.id).await?.life;
        Ok(life.state != job.life.state || life.attempt != job.life.attempt)
    }

    pub(super) async fn change(
        &self,
        job: &JobRecord,
        next: super::Life,
        lease: Option<&Lease>,
    ) -> Result<Step, Fault> {
        if next.state.has_ended() {
            self.write_result(job, &next).await;
        }
        self.store.change_job(job.id, &job.life, &next, lease).await?;
        self.job_changed(job.id, next.state);
        Ok(Step::Again)
    }
}

fn in_doubt(standing: Standing) -> Option<&'static str> {
    match standing {
        Standing::Unasked | Standing::Kept => None,
        Standing::Doubtful => Some("the allocator does not answer"),
        Standing::Over => Some("its lease is over"),
    }
}

fn lease_request(job: &JobRecord, user: &UserRecord) -> LeaseRequest {
    let need = job.spec.need.clone().unwrap_or(Need::Cpu);
    let slices = job.spec.slices.unwrap_or(1);
    LeaseRequest {
        limits: user_limits(user),
        slices,
        // Its container is on one node, and so have all its slices to be.
        nodes: (slices > 1).then_some(1),
        project: job.spec.project.clone(),
        priority: job.spec.priority,
        preemptible: job.spec.preemptible,
        expected_seconds: job.spec.time_limit_seconds,
        reservation: job.spec.reservation.clone(),
        ..LeaseRequest::new(job.next().to_string(), &user.name, need)
    }
}

fn progress_in_words(progress: &StartProgress) -> String {
    match progress {
        StartProgress::Pulling(done, Some(total)) if *total > 0 => {
            format!("fetching the image: {} %", done.saturating_mul(100) / total)
        }
        StartProgress::Pulling(..) => "fetching the image".into(),
        StartProgress::Creating => "making its container".into(),
        StartProgress::Connecting => "waiting for its agent".into(),
    }
}
