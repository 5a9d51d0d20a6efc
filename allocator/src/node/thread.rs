//! A thread whose end can be waited for with a bound: a call of a driver may never return.

use std::{
    convert::Infallible,
    io,
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread::{Builder, JoinHandle},
    time::Instant,
};

/// A thread. Dropped, it is left to itself.
pub(super) struct Thread {
    handle: JoinHandle<()>,
    /// Nothing ever comes; it is cut off when the thread has done its work, by panic too. Locked because a
    /// receiver cannot be shared, and who owns a thread may be.
    ended: Mutex<Receiver<Infallible>>,
}

impl Thread {
    /// Starts a thread.
    pub(super) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (alive, ended) = channel();
        let handle = Builder::new().name(name.to_owned()).spawn(move || {
            let _alive = alive;
            work();
        })?;
        Ok(Self { handle, ended: Mutex::new(ended) })
    }

    /// Whether it has ended.
    pub(super) fn is_finished(&self) -> bool {
        self.handle.is_finished()
    }

    /// Waits for its end until `deadline`; gives it back if it has not ended by then.
    pub(super) fn join_by(mut self, deadline: Instant) -> Result<(), Self> {
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        match ended.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Err(RecvTimeoutError::Timeout) => return Err(self),
            Err(RecvTimeoutError::Disconnected) => {}
            Ok(never) => match never {},
        }
        let name = self.handle.thread().name().unwrap_or_default().to_owned();
        // Its work is done, so this takes no time.
        if self.handle.join().is_err() {
            tracing::error!(name, "a thread of the GPUs ended by panic");
        }
        Ok(())
    }
}
