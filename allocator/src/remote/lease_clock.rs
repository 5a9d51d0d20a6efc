//! When a daemon's lease runs out: by a clock that nobody sets and that goes on while the machine sleeps, and kept in a
//! file, so that a daemon that starts again knows it.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// How often is looked whether the lease has run out: a timer of the system does not go on while it sleeps.
const LOOK: Duration = Duration::from_millis(200);

/// A daemon's lease.
#[derive(Debug)]
pub(super) struct LeaseClock {
    file: PathBuf,
    boot: String,
    /// Until when it is held; none if it is not, and nothing that ran under one runs any more.
    until: Mutex<Option<Duration>>,
}

/// What the file holds.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    boot: String,
    until_ms: u64,
}

impl LeaseClock {
    /// Takes up what an earlier daemon left in `folder` since the machine was started.
    ///
    /// # Errors
    /// When the file cannot be read, or is not one of ours.
    pub(super) fn open(folder: &Path, boot: &str) -> io::Result<Self> {
        let file = folder.join("lease.json");
        let kept = match fs::read(&file) {
            Ok(bytes) => Some(serde_json::from_slice::<Kept>(&bytes).map_err(io::Error::other)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let until = kept.filter(|kept| kept.boot == boot).map(|kept| Duration::from_millis(kept.until_ms));
        Ok(Self { file, boot: boot.to_owned(), until: Mutex::new(until) })
    }

    /// Whether there is a lease, be it run out.
    pub(super) fn is_held(&self) -> bool {
        self.until().is_some()
    }

    /// Whether there is a lease that has run out.
    pub(super) fn has_run_out(&self) -> bool {
        self.until().is_some_and(|until| until <= now())
    }

    /// The lease lasts until then, at least.
    ///
    /// # Errors
    /// When that cannot be kept: it does not count then.
    pub(super) fn extend(&self, until: Duration) -> io::Result<()> {
        if self.until().is_some_and(|other| other >= until) {
            return Ok(());
        }
        let until_ms = u64::try_from(until.as_millis()).unwrap_or(u64::MAX);
        let kept = serde_json::to_vec(&Kept { boot: self.boot.clone(), until_ms }).map_err(io::Error::other)?;
        let new = self.file.with_extension("new");
        fs::write(&new, kept)?;
        fs::rename(&new, &self.file)?;
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
        Ok(())
    }

    /// The lease is over now, whatever it was.
    pub(super) fn run_out(&self) {
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        *until = Some(Duration::ZERO);
    }

    /// Nothing that ran under the lease runs any more.
    ///
    /// # Errors
    /// When that cannot be kept.
    pub(super) fn clear(&self) -> io::Result<()> {
        match fs::remove_file(&self.file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        *self.until.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    /// Waits until there is a lease that has run out.
    pub(super) async fn runs_out(&self) {
        while !self.has_run_out() {
            tokio::time::sleep(LOOK).await;
        }
    }

    fn until(&self) -> Option<Duration> {
        *self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The time since the machine was started, sleep included.
pub(super) fn now() -> Duration {
    let time = clock_gettime(ClockId::Boottime);
    let (seconds, nanoseconds) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap_or(0), nanoseconds.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lease_is_known_after_a_restart_of_the_daemon_and_not_of_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        let open = |boot| LeaseClock::open(folder.path(), boot).unwrap();
        let clock = open("boot-1");
        assert!(!clock.is_held() && !clock.has_run_out());
        clock.extend(now() + Duration::from_secs(600)).unwrap();
        clock.extend(now()).unwrap();
        assert!(clock.is_held() && !clock.has_run_out(), "an answer that comes late shortens nothing");
        assert!(open("boot-1").is_held());
        assert!(!open("boot-2").is_held());
        clock.run_out();
        clock.runs_out().await;
        clock.clear().unwrap();
        assert!(!clock.is_held() && !open("boot-1").is_held());
    }

    #[test]
    fn a_lease_that_cannot_be_kept_does_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let clock = LeaseClock::open(folder.path(), "boot-1").unwrap();
        fs::create_dir(folder.path().join("lease.new")).unwrap();
        assert!(clock.extend(now() + Duration::from_secs(600)).is_err());
        assert!(!clock.is_held());
    }
}
