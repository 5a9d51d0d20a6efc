//! When each lease expires.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

/// Deadlines of leases, by fence and by time.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    of: HashMap<u64, Duration>,
    by_time: BTreeSet<(Duration, u64)>,
}

impl Deadlines {
    /// Sets, or moves, the deadline of a lease.
    pub(super) fn set(&mut self, fence: u64, at: Duration) {
        self.remove(fence);
        self.of.insert(fence, at);
        self.by_time.insert((at, fence));
    }

    /// The lease has no deadline any more.
    pub(super) fn remove(&mut self, fence: u64) {
        if let Some(at) = self.of.remove(&fence) {
            self.by_time.remove(&(at, fence));
        }
    }

    /// The next deadline.
    pub(super) fn next(&self) -> Option<Duration> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes out a lease whose deadline has passed.
    pub(super) fn pop(&mut self, now: Duration) -> Option<u64> {
        let (_, fence) = self.by_time.first().copied().filter(|(at, _)| *at <= now)?;
        self.remove(fence);
        Some(fence)
    }
}
