//! What can go wrong with jobs, in words for the person who asked.

use super::state::{Illegal, word};
use crate::{files::FilesError, image::ImageError, runtime::RuntimeError, store::StoreError};
use mlad::api::{JobId, JobState};
use mlad_allocator::AllocatorError;

/// What can go wrong with jobs.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The submission is malformed.
    #[error("{0}")]
    Spec(String),
    /// No image was named and none is the default.
    #[error("no image was named, and there is no default")]
    NoImage,
    /// What is asked for can never fit.
    #[error("{0}")]
    Impossible(String),
    /// It is more than the user may ever hold.
    #[error("{0}")]
    OverQuota(String),
    /// The user is no member of such a project.
    #[error("there is no project {0} of which you are a member")]
    Project(String),
    /// The priority is more than the user may ask for.
    #[error("your jobs may have a priority of at most {most}, and {wanted} was asked for")]
    Priority {
        /// What was asked for.
        wanted: i32,
        /// What may be.
        most: i32,
    },
    /// The user has as many jobs as they may.
    #[error("you have {have} jobs that have not ended, and {most} are allowed")]
    TooMany {
        /// How many there are.
        have: u32,
        /// How many may be.
        most: u32,
    },
    /// The key belongs to another job.
    #[error("the idempotency key was used for job {0}, which runs another command")]
    KeyUsed(JobId),
    /// The job's state does not allow it.
    #[error("job {id} is {} and cannot {verb}", word(*state))]
    State {
        /// Which job.
        id: JobId,
        /// Its state.
        state: JobState,
        /// What was asked.
        verb: &'static str,
    },
    /// The image is unknown.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The allocator refuses or does not answer.
    #[error(transparent)]
    Allocator(#[from] AllocatorError),
    /// The container engine refuses or does not answer.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The database refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of the job cannot be read.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// Reading failed half-way.
    #[error("reading failed: {0}")]
    Read(#[from] std::io::Error),
    /// The gateway is ending.
    #[error("the gateway is being stopped")]
    Stopping,
}

impl JobError {
    pub(super) fn illegal(id: JobId, illegal: &Illegal) -> Self {
        Self::State { id, state: illegal.from, verb: illegal.verb }
    }
}
