//! The `result` file in a job's folder: how it ended, for its user's scripts and for later.
//!
//! It is written before the end is stored, and after a crash between the two once more. What keeps it from being
//! written (a full disk, a link put in its way) is the user's to see to and never keeps a job from ending.

use super::{
    controller::Controller,
    reconcile::Fault,
    state::Life,
    workload::{job_directory, job_folder},
};
use crate::{files, store::JobRecord};
use jiff::Timestamp;
use mlad::api::JobEnd;
use std::{sync::Arc, time::Duration};

/// Results written at once.
pub(super) const AT_ONCE: usize = 8;
/// Longest time for one: a file system may hang.
const TIME: Duration = Duration::from_secs(10);

impl Controller {
    /// Writes down how the job is about to end.
    pub(super) async fn write_result(&self, job: &JobRecord, life: &Life) {
        let why = match tokio::time::timeout(TIME, self.try_write_result(job, life)).await {
            Ok(Ok(())) => return,
            Ok(Err(fault)) => fault.to_string(),
            Err(_) => format!("no answer from the file system within {} seconds", TIME.as_secs()),
        };
        let path = job_directory(&job.user, job.id).join("result");
        tracing::warn!(job = job.id, user = job.user, path = %path.display(), why, "the result of a job cannot be \
                        written into its folder; the job ends all the same");
    }

    async fn try_write_result(&self, job: &JobRecord, life: &Life) -> Result<(), Fault> {
        let user = self.store.user_by_id(job.user_id).await?;
        let text = text(job, life)?;
        let path = job_folder(job.id).join("result");
        let config = Arc::clone(&self.config);
        // Held by the thread: one that hangs goes on doing so when nobody waits for it any more.
        let Ok(permit) = Arc::clone(&self.results).acquire_owned().await else { return Ok(()) };
        let write = move || {
            let _permit = permit;
            // A job that never started may be its user's first trace.
            files::ensure_home(&config, &user)?;
            files::write_in_home(&config, &user, &path, text.as_bytes())
        };
        Ok(tokio::task::spawn_blocking(write).await??)
    }
}

fn text(job: &JobRecord, life: &Life) -> Result<String, serde_json::Error> {
    let end = JobEnd {
        id: job.id,
        name: job.name.clone(),
        state: life.state,
        reason: life.reason,
        detail: life.detail.clone(),
        exit_code: life.exit_code,
        signal: life.signal.clone(),
        attempt: life.attempt,
        submitted_at: job.submitted_at,
        started_at: life.started_at,
        // As the database will hold it: this one has not been there yet.
        ended_at: life.ended_at.map(|at| Timestamp::from_microsecond(at.as_microsecond()).unwrap_or(at)),
    };
    Ok(serde_json::to_string_pretty(&end)? + "\n")
}
