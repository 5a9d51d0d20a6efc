//! Reaching the agent of a container: waiting until it listens, and connecting to it.

use super::run_folder::RunFolder;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
    time::Instant,
};

/// How long a connection is tried while more wait at the agent's socket than it takes.
const FULL: Duration = Duration::from_secs(5);
/// First and longest pause between tries where nothing can be watched.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// A watch on a run folder, made before its container starts so that nothing is missed.
#[derive(Debug)]
pub(super) struct Arrival {
    events: AsyncFd<OwnedFd>,
}

impl Arrival {
    pub(super) fn watch(folder: &RunFolder) -> io::Result<Self> {
        let events = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let path = format!("/proc/self/fd/{}", folder.as_fd().as_raw_fd());
        inotify::add_watch(&events, path, WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR)?;
        // Its replacement is unsafe, for types that may let go of their descriptor. `OwnedFd` does not.
        #[expect(deprecated)]
        let events = AsyncFd::with_interest(events, Interest::READABLE)?;
        Ok(Self { events })
    }

    /// Returns when the agent listens. Ends only then: the caller watches the container and the clock.
    pub(super) async fn listens(&self, folder: &RunFolder) -> io::Result<()> {
        loop {
            match folder.connect().await {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => self.something_new().await?,
                // Between bind and listen, or while it ends: those moments cannot be watched.
                Err(error) if is_transient(&error) => {
                    let (mut pause, longest) = PAUSE;
                    while folder.connect().await.is_err_and(|error| is_transient(&error)) {
                        tokio::time::sleep(pause).await;
                        pause = (pause * 2).min(longest);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn something_new(&self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        self.events.async_io(Interest::READABLE, |events| Ok(rustix::io::read(events, &mut buffer)?)).await.map(drop)
    }
}

/// A new connection to an agent that listens.
pub(super) async fn connect(folder: &RunFolder) -> io::Result<UnixStream> {
    let until = Instant::now() + FULL;
    let (mut pause, longest) = PAUSE;
    loop {
        match folder.connect().await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(longest);
            }
            result => return result,
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset | io::ErrorKind::WouldBlock
    )
}
