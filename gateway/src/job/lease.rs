//! Keeps the leases of attempts: renews each at a third of its time, and says which cannot be kept.

use super::{queue::WorkQueue, state::AttemptName};
use futures::{StreamExt as _, stream};
use mlad::api::Lease;
use mlad_allocator::{Allocate, AllocatorError};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// Renewals under way at once.
const AT_ONCE: usize = 8;
/// Shortest time between two renewals of one lease.
const SHORTEST: Duration = Duration::from_millis(100);

/// What is known of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// The allocator has not been asked since it was taken up.
    Unasked,
    /// It was renewed in time.
    Kept,
    /// The allocator has not answered for as long as the lease lasts.
    Doubtful,
    /// It is over.
    Over,
}

struct Kept {
    fence: u64,
    /// How long a renewal lasts.
    lasts: Duration,
    renew_at: Instant,
    ends_at: Instant,
    standing: Standing,
}

/// The leases of all attempts that are under way.
#[derive(Default)]
pub(super) struct Keeper {
    kept: Mutex<HashMap<AttemptName, Kept>>,
    wake: Notify,
}

impl Keeper {
    /// Keeps this lease from now on, and asks the allocator about it at once. Repeatable.
    pub(super) fn keep(&self, name: AttemptName, lease: &Lease) -> Standing {
        let mut kept = self.lock();
        if let Some(known) = kept.get(&name) {
            return known.standing;
        }
        let lasts = Duration::try_from(lease.expires_at.duration_since(lease.granted_at)).unwrap_or_default();
        let now = Instant::now();
        kept.insert(
            name,
            Kept { fence: lease.fence, lasts, renew_at: now, ends_at: now + lasts, standing: Standing::Unasked },
        );
        drop(kept);
        self.wake.notify_one();
        Standing::Unasked
    }

    /// Keeps it no longer: it is to be released.
    pub(super) fn let_go(&self, name: AttemptName) {
        self.lock().remove(&name);
    }

    /// Renews until the future is dropped. Jobs whose lease's standing changes are put into the queue.
    pub(super) async fn run(&self, allocator: Arc<dyn Allocate>, queue: &WorkQueue) {
        loop {
            let (due, next) = self.due();
            stream::iter(due)
                .for_each_concurrent(AT_ONCE, |(name, fence)| self.renew(name, fence, &*allocator, queue))
                .await;
            match next {
                Some(at) => tokio::select! {
                    () = self.wake.notified() => {}
                    () = tokio::time::sleep_until(at) => {}
                },
                None => self.wake.notified().await,
            }
        }
    }

    /// What is to be renewed now, and when the first of the others is.
    fn due(&self) -> (Vec<(AttemptName, u64)>, Option<Instant>) {
        let now = Instant::now();
        let mut due = Vec::new();
        let mut next = None;
        for (name, kept) in self.lock().iter_mut().filter(|(_, kept)| kept.standing != Standing::Over) {
            if kept.renew_at <= now {
                due.push((*name, kept.fence));
                // Should it fail: sooner than a third, to have several tries before the end.
                kept.renew_at = now + (kept.lasts / 12).max(SHORTEST);
            }
            next = Some(next.map_or(kept.renew_at, |at: Instant| at.min(kept.renew_at)));
        }
        (due, next)
    }

    async fn renew(&self, name: AttemptName, fence: u64, allocator: &dyn Allocate, queue: &WorkQueue) {
        let asked = Instant::now();
        let answer = allocator.renew(&name.to_string(), fence).await;
        let mut kept = self.lock();
        let Some(known) = kept.get_mut(&name) else { return };
        let before = known.standing;
        match answer {
            Ok(_) => {
                known.standing = Standing::Kept;
                known.renew_at = asked + (known.lasts / 3).max(SHORTEST);
                known.ends_at = asked + known.lasts;
            }
            Err(AllocatorError::Ended(_) | AllocatorError::Fence(_) | AllocatorError::Unknown(_)) => {
                tracing::warn!(workload = %name, fence, "its lease is over; the attempt will be ended");
                known.standing = Standing::Over;
            }
            Err(error) => {
                tracing::warn!(workload = %name, fence, %error, "its lease cannot be renewed now; trying again");
                if Instant::now() >= known.ends_at {
                    known.standing = Standing::Doubtful;
                }
            }
        }
        let changed = known.standing != before;
        drop(kept);
        if changed {
            queue.add(name.job);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<AttemptName, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
