//! Watches files for writes and folders for new names, all with one inotify instance: a kernel gives a user few
//! of them.

use mlad::channel::register;
use rustix::{fs::inotify, io::Errno};
use std::{
    collections::HashMap,
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::watch,
};

/// The watch. Bounded by its subscriptions: one entry for every file or folder that somebody follows.
pub(super) struct Watcher {
    inotify: AsyncFd<OwnedFd>,
    files: Mutex<HashMap<i32, Watched>>,
}

struct Watched {
    subscriptions: usize,
    written: watch::Sender<()>,
}

/// News of one file or folder, for as long as it lives.
pub(super) struct Subscription {
    watcher: Arc<Watcher>,
    number: i32,
    written: watch::Receiver<()>,
}

impl Watcher {
    /// Needs a running reactor.
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
        Ok(Arc::new(Self { inotify: register(inotify::init(flags)?, Interest::READABLE)?, files: Mutex::default() }))
    }

    /// Watches an open file for writes.
    pub(super) fn watch(self: &Arc<Self>, file: &File) -> io::Result<Subscription> {
        self.add(file, inotify::WatchFlags::MODIFY)
    }

    /// Watches an open folder for new names.
    pub(super) fn watch_folder(self: &Arc<Self>, folder: &OwnedFd) -> io::Result<Subscription> {
        use inotify::WatchFlags;
        self.add(folder, WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR)
    }

    /// By the descriptor: the path may be another file's by now.
    fn add(self: &Arc<Self>, file: impl AsFd, what: inotify::WatchFlags) -> io::Result<Subscription> {
        let mut files = self.lock();
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        // The same number for the same file.
        let number = inotify::add_watch(self.inotify.get_ref(), path, what)?;
        let watched =
            files.entry(number).or_insert_with(|| Watched { subscriptions: 0, written: watch::Sender::new(()) });
        watched.subscriptions += 1;
        let written = watched.written.subscribe();
        Ok(Subscription { watcher: Arc::clone(self), number, written })
    }

    /// Passes news on until the future is dropped.
    pub(super) async fn run(&self) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(self.inotify.get_ref(), &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => self.tell(event.wd(), event.events()),
                // What comes after the flag is cleared sets it again; everything before is read now.
                Err(Errno::WOULDBLOCK) => self.inotify.readable().await?.clear_ready(),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn tell(&self, number: i32, events: inotify::ReadFlags) {
        let files = self.lock();
        if events.contains(inotify::ReadFlags::QUEUE_OVERFLOW) {
            for watched in files.values() {
                watched.written.send_replace(());
            }
        } else if let Some(watched) = files.get(&number) {
            watched.written.send_replace(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Watched>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscription {
    /// Resolves when the file was written to, or something new came into the folder, since this was last asked
    /// (or since it is watched).
    pub(super) async fn news(&mut self) {
        if self.written.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut files = self.watcher.lock();
        if let Some(watched) = files.get_mut(&self.number) {
            watched.subscriptions -= 1;
            if watched.subscriptions == 0 {
                files.remove(&self.number);
                // Fails if the file is gone, and the watch with it.
                let _ = inotify::remove_watch(self.watcher.inotify.get_ref(), self.number);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write as _, time::Duration};

    #[tokio::test]
    async fn two_who_follow_one_file_both_hear_of_a_write_and_the_watch_ends_with_them() {
        let watcher = Watcher::new().unwrap();
        let running = tokio::spawn({
            let watcher = Arc::clone(&watcher);
            async move { watcher.run().await }
        });
        let mut file = tempfile::tempfile().unwrap();
        let mut one = watcher.watch(&file).unwrap();
        let mut other = watcher.watch(&file).unwrap();
        file.write_all(b"a").unwrap();
        let both = async { tokio::join!(one.news(), other.news()) };
        tokio::time::timeout(Duration::from_secs(10), both).await.unwrap();
        drop(one);
        file.write_all(b"b").unwrap();
        tokio::time::timeout(Duration::from_secs(10), other.news()).await.unwrap();
        drop(other);
        assert!(watcher.lock().is_empty());
        running.abort();
    }
}
