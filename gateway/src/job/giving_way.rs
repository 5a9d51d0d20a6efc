//! A job whose lease is going to end: it is told at once, has until then to end by itself, and waits again if it
//! has not come to a good end.

use super::{
    controller::Controller,
    lease::Standing,
    reconcile::{Fault, Step},
    state::AttemptName,
};
use crate::{
    runtime::{Ended, FoundState},
    store::JobRecord,
};
use jiff::Timestamp;
use mlad::{
    api::{Ending, JobReason, Lease},
    channel::Exit,
};
use std::time::Duration;
use tokio::time::Instant;

impl Controller {
    /// starting, while the lease is about to end: nothing is begun that would be ended at once.
    pub(super) async fn give_way_unstarted(
        &self,
        job: &JobRecord,
        name: AttemptName,
        ending: &Ending,
    ) -> Result<Step, Fault> {
        self.queue_again(job, name, in_words(ending)).await
    }

    /// running, with notice: what was written down is told to the command, again after a restart of the gateway.
    pub(super) async fn give_way(&self, job: &JobRecord, name: AttemptName, lease: &Lease) -> Result<Step, Fault> {
        let ending = self.ending_of(name);
        if let Some(ending) = &ending
            && job.life.reason != Some(JobReason::Preempted)
        {
            tracing::info!(workload = %name, at = %ending.at, reason = ending.reason, "a job has notice");
            return self.change(job, job.life.noticed(in_words(ending))?, None).await;
        }
        let workload = name.to_string();
        match self.runtime.inspect(&workload).await?.map(|found| found.state) {
            Some(FoundState::Running) => {}
            Some(FoundState::Ended(ended)) => return self.end_noticed(job, name, &ended).await,
            Some(FoundState::Created) | None => return self.queue_again(job, name, told(job)).await,
        }
        if self.terminated(name).is_none() {
            self.runtime.terminate(&workload).await?;
            self.set_terminated(name);
        }
        let over = self.keeper.keep(name, lease) == Standing::Over;
        let left =
            ending.map(|ending| Duration::try_from(ending.at.duration_since(Timestamp::now())).unwrap_or_default());
        match left {
            Some(left) if !over && !left.is_zero() => Ok(Step::Rest(Instant::now().checked_add(left))),
            // Taken back: it was told to end and may go on.
            None if !over => self.mind_the_time(job, name, false).await,
            _ => {
                tracing::info!(workload, "the notice is over; ending the job's attempt");
                self.queue_again(job, name, told(job)).await
            }
        }
    }

    /// What ends well within its notice has succeeded; anything else was the end of its notice.
    async fn end_noticed(&self, job: &JobRecord, name: AttemptName, ended: &Ended) -> Result<Step, Fault> {
        let result = self.runtime.result(&name.to_string()).await?;
        let well = result.map_or(ended.exit_code == 0, |result| result.exit == Exit::Status(0));
        if well { self.collect(job, name, ended).await } else { self.queue_again(job, name, told(job)).await }
    }

    /// Proves the attempt dead, then lets the job wait again.
    async fn queue_again(&self, job: &JobRecord, name: AttemptName, why: String) -> Result<Step, Fault> {
        self.end_attempt(name).await?;
        tracing::info!(job = job.id, why, "a job gave way and waits again");
        self.change(job, job.life.requeued(JobReason::Preempted, why)?, None).await
    }
}

fn in_words(ending: &Ending) -> String {
    format!("it has to give its slice back at {:.0}: {}", ending.at, ending.reason)
}

fn told(job: &JobRecord) -> String {
    job.life.detail.clone().unwrap_or_else(|| "its lease was over".into())
}
