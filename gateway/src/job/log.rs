//! A job's log as it grows: read from the user's home, ended by the job's end.

use super::{JobError, controller::Controller, watcher::Subscription, workload::job_folder};
use crate::{
    config::Config,
    files::{self, FilesError},
    store::{JobRecord, UserRecord},
};
use bytes::Bytes;
use futures::{Stream, stream};
use std::{fs::File, io, mem, os::unix::fs::FileExt as _, path::Path, sync::Arc};

/// Bytes read at once.
const CHUNK: usize = 128 * 1024;

/// A reader of one job's log.
pub(super) struct Follower {
    controller: Arc<Controller>,
    user: UserRecord,
    job: JobRecord,
    offset: u64,
    follow: bool,
    source: Source,
    /// What was read and not yet passed on.
    read: Bytes,
}

/// Where the bytes come from.
enum Source {
    /// There is no log, and nothing to watch for it.
    None,
    /// There is no log yet: the folder in which the next part of its path will appear is watched.
    Awaited(Subscription),
    Open {
        file: Arc<File>,
        written: Subscription,
    },
}

impl Follower {
    /// A reader that has tried to read: what keeps the log from being read is told now, and not in the middle of
    /// the answer, where nobody could tell it from a lost connection.
    pub(super) async fn begin(
        controller: Arc<Controller>,
        user: UserRecord,
        job: JobRecord,
        offset: u64,
        follow: bool,
    ) -> Result<Self, JobError> {
        let mut this = Self { controller, user, job, offset, follow, source: Source::None, read: Bytes::new() };
        this.read = this.read().await?;
        Ok(this)
    }

    /// The log from the offset on. It ends where the log ends; if it is followed, not before the job has
    /// ended.
    pub(super) fn stream(self) -> impl Stream<Item = Result<Bytes, JobError>> + Send + 'static {
        stream::try_unfold(self, |mut this| async move { Ok(this.next().await?.map(|bytes| (bytes, this))) })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, JobError> {
        let read = mem::take(&mut self.read);
        if !read.is_empty() {
            return Ok(Some(read));
        }
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
                () = self.source.news() => {}
                () = self.controller.stop.cancelled() => return Err(JobError::Stopping),
            }
        }
    }

    /// What there is at the offset; nothing if there is no more, or no log yet.
    async fn read(&mut self) -> Result<Bytes, JobError> {
        if !matches!(self.source, Source::Open { .. }) {
            self.open().await?;
        }
        let Source::Open { file, .. } = &self.source else { return Ok(Bytes::new()) };
        let (file, offset) = (Arc::clone(file), self.offset);
        let bytes = tokio::task::spawn_blocking(move || read_at(&file, offset)).await.map_err(io::Error::other)??;
        self.offset = self.offset.saturating_add(bytes.len() as u64);
        Ok(bytes)
    }

    /// Opens the log, or watches for it.
    async fn open(&mut self) -> Result<(), JobError> {
        let mut file = self.look(files::open_in_home).await?;
        let mut watched = None;
        while file.is_none() && self.follow {
            let Some(folder) = self.look(files::last_folder_in_home).await? else {
                self.source = Source::None;
                break;
            };
            let there = rustix::fs::fstat(&folder).map(|stat| (stat.st_dev, stat.st_ino)).map_err(io::Error::from)?;
            // It was the last one also when it was watched already: nothing has come into it unseen.
            if watched == Some(there) {
                break;
            }
            self.source = Source::Awaited(self.controller.watcher.watch_folder(&folder)?);
            watched = Some(there);
            // It may have appeared before the watch, and so may the next folder.
            file = self.look(files::open_in_home).await?;
        }
        if let Some(file) = file {
            let written = self.controller.watcher.watch(&file)?;
            self.source = Source::Open { file: Arc::new(file), written };
        }
        Ok(())
    }

    /// What `find` finds at the log's path; none if nothing is there.
    async fn look<T: Send + 'static>(
        &self,
        find: fn(&Config, &UserRecord, &Path) -> Result<T, FilesError>,
    ) -> Result<Option<T>, JobError> {
        let config = Arc::clone(&self.controller.config);
        let (user, path) = (self.user.clone(), job_folder(self.job.id).join("log"));
        match tokio::task::spawn_blocking(move || find(&config, &user, &path)).await.map_err(io::Error::other)? {
            Ok(found) => Ok(Some(found)),
            Err(FilesError::Path { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Source {
    /// Resolves when the log was written to; or, if there is none yet, when it may have been made.
    async fn news(&mut self) {
        match self {
            Self::Open { written: news, .. } | Self::Awaited(news) => news.news().await,
            // Its user has no home yet: the job gets it one, and that is news of the job.
            Self::None => std::future::pending().await,
        }
    }
}

fn read_at(file: &File, offset: u64) -> io::Result<Bytes> {
    // The kernel refuses to read beyond the largest offset it knows, also where there is nothing.
    let left = i64::MAX.unsigned_abs().saturating_sub(offset);
    let mut chunk = vec![0; usize::try_from(left).map_or(CHUNK, |left| left.min(CHUNK))];
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
