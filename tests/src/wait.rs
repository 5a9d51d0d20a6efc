//! Waiting for what must become true.

use std::{
    sync::mpsc,
    thread::{self, sleep},
    time::{Duration, Instant},
};

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(100);

/// Returns when `condition` holds.
///
/// # Panics
/// When it does not within `limit`.
pub fn eventually(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    eventually_some(what, limit, || condition().then_some(()));
}

/// Returns what `look` finds as soon as it finds something.
///
/// # Panics
/// When it finds nothing within `limit`.
pub fn eventually_some<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        sleep(PAUSE);
    }
}

/// Returns what `work` returns: for a read or a wait that has no deadline of its own.
///
/// # Panics
/// When it panics, or does not return within `limit`.
pub fn within<T: Send + 'static>(what: &str, limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    thread::spawn(move || drop(done.send(work())));
    result.recv_timeout(limit).unwrap_or_else(|error| panic!("not within {limit:?}: {what} ({error})"))
}
