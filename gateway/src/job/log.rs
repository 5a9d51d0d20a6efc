//! A job's log as it grows: read from the user's home, ended by the job's end.

use super::{JobError, controller::Controller, watcher::Subscription, workload::job_folder};
use crate::{
    files::{self, FilesError},
    store::{JobRecord, UserRecord},
};
use bytes::Bytes;
use futures::{Stream, stream};
use mlad::api::JobState;
use std::{fs::File, io, os::unix::fs::FileExt as _, sync::Arc, time::Duration};

/// Bytes read at once.
const CHUNK: usize = 128 * 1024;
/// Time after which it is looked again whether the agent of a job that has begun has made the log.
const APPEARS: Duration = Duration::from_millis(500);

/// A reader of one job's log.
pub(super) struct Follower {
    controller: Arc<Controller>,
    user: UserRecord,
    job: JobRecord,
    offset: u64,
    follow: bool,
    open: Option<Open>,
}

struct Open {
    file: Arc<File>,
    written: Subscription,
}

impl Follower {
    pub(super) fn new(
        controller: Arc<Controller>,
        user: UserRecord,
        job: JobRecord,
        offset: u64,
        follow: bool,
    ) -> Self {
        Self { controller, user, job, offset, follow, open: None }
    }

    /// The log from the offset on. It ends where the log ends; if it is followed, not before the job has
    /// ended.
    pub(super) fn stream(self) -> impl Stream<Item = Result<Bytes, JobError>> + Send + 'static {
        stream::try_unfold(self, |mut this| async move { Ok(this.next().await?.map(|bytes| (bytes, this))) })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, JobError> {
        let mut news = self.controller.watch(self.job.id);
        loop {
            // Asked before the file is read: what is written before the end is then read after it.
            let state = self.controller.store.job(self.job.id).await?.life.state;
            let bytes = self.read().await?;
            if !bytes.is_empty() {
                return Ok(Some(bytes));
            }
            if state.has_ended() || !self.follow {
                return Ok(None);
            }
            tokio::select! {
                _ = news.changed() => {}
                () = grown(self.open.as_mut(), state) => {}
                () = self.controller.stop.cancelled() => return Err(JobError::Stopping),
            }
        }
    }

    /// What there is at the offset; nothing if there is no more, or no log yet.
    async fn read(&mut self) -> Result<Bytes, JobError> {
        if self.open.is_none() {
            self.open = self.open().await?;
        }
        let Some(open) = &self.open else { return Ok(Bytes::new()) };
        let file = Arc::clone(&open.file);
        let offset = self.offset;
        let bytes = tokio::task::spawn_blocking(move || read_at(&file, offset)).await.map_err(io::Error::other)??;
        self.offset = self.offset.saturating_add(bytes.len() as u64);
        Ok(bytes)
    }

    async fn open(&self) -> Result<Option<Open>, JobError> {
        let config = Arc::clone(&self.controller.config);
        let (user, path) = (self.user.clone(), job_folder(self.job.id).join("log"));
        let opened = tokio::task::spawn_blocking(move || files::open_in_home(&config, &user, &path));
        match opened.await.map_err(io::Error::other)? {
            Ok(file) => {
                let written = self.controller.watcher.watch(&file)?;
                Ok(Some(Open { file: Arc::new(file), written }))
            }
            Err(FilesError::Path { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn read_at(file: &File, offset: u64) -> io::Result<Bytes> {
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read_at(&mut chunk, offset) {
            Ok(count) => {
                chunk.truncate(count);
                return Ok(chunk.into());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Resolves when the log was written to; or, if there is none yet, when it may have been made.
async fn grown(open: Option<&mut Open>, state: JobState) {
    match open {
        Some(open) => open.written.written().await,
        None if matches!(state, JobState::Starting | JobState::Running | JobState::Cancelling) => {
            tokio::time::sleep(APPEARS).await;
        }
        None => std::future::pending().await,
    }
}
