//! Which jobs want to be looked at, and when: one entry a job, one worker a job at a time.

use mlad::api::JobId;
use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// First delay after a failed look; doubles up to [`LONGEST_DELAY`].
const FIRST_DELAY: Duration = Duration::from_millis(200);
/// Longest delay after failed looks.
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// The queue of a controller. At most one entry for every live job.
#[derive(Default)]
pub(super) struct WorkQueue {
    inner: Mutex<Inner>,
    wake: Notify,
}

#[derive(Default)]
struct Inner {
    due: BTreeSet<(Instant, JobId)>,
    when: HashMap<JobId, Instant>,
    taken: HashMap<JobId, Taken>,
    failures: HashMap<JobId, u32>,
}

struct Taken {
    again: bool,
    poke: Arc<Notify>,
}

/// What a look came to.
pub(super) enum Looked {
    /// Nothing to do until something happens, or until this time.
    Rest(Option<Instant>),
    /// It failed: again after a while, longer each time.
    Failed,
}

impl WorkQueue {
    /// Wants the job looked at now. If it is being looked at, its worker is poked and it comes again after.
    pub(super) fn add(&self, id: JobId) {
        let mut inner = self.lock();
        if let Some(taken) = inner.taken.get_mut(&id) {
            taken.again = true;
            taken.poke.notify_one();
            return;
        }
        inner.schedule(id, Instant::now());
        drop(inner);
        self.wake.notify_one();
    }

    /// The next job that is due, with what pokes its worker. For one caller at a time.
    pub(super) async fn next(&self) -> (JobId, Arc<Notify>) {
        loop {
            let first = {
                let mut inner = self.lock();
                match inner.due.first().copied() {
                    Some((at, id)) if at <= Instant::now() => return (id, inner.take(at, id)),
                    first => first,
                }
            };
            match first {
                Some((at, _)) => tokio::select! {
                    () = self.wake.notified() => {}
                    () = tokio::time::sleep_until(at) => {}
                },
                None => self.wake.notified().await,
            }
        }
    }

    /// The job's worker is done with it.
    pub(super) fn done(&self, id: JobId, looked: &Looked) {
        let mut inner = self.lock();
        let again = inner.taken.remove(&id).is_some_and(|taken| taken.again);
        let at = match looked {
            Looked::Rest(at) => {
                inner.failures.remove(&id);
                if again { Some(Instant::now()) } else { *at }
            }
            // Also if it was poked: what fails is not to be tried as fast as pokes come.
            Looked::Failed => {
                let failures = inner.failures.entry(id).or_default();
                *failures = failures.saturating_add(1);
                Some(Instant::now() + delay(*failures))
            }
        };
        if let Some(at) = at {
            inner.schedule(id, at);
        }
        drop(inner);
        self.wake.notify_one();
    }

    /// Forgets how often jobs failed: what they failed for is back.
    pub(super) fn forgive(&self) {
        self.lock().failures.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The earliest wish counts.
    fn schedule(&mut self, id: JobId, at: Instant) {
        if let Some(before) = self.when.get(&id).copied() {
            if before <= at {
                return;
            }
            self.due.remove(&(before, id));
        }
        self.when.insert(id, at);
        self.due.insert((at, id));
    }

    fn take(&mut self, at: Instant, id: JobId) -> Arc<Notify> {
        self.due.remove(&(at, id));
        self.when.remove(&id);
        let poke = Arc::new(Notify::new());
        self.taken.insert(id, Taken { again: false, poke: Arc::clone(&poke) });
        poke
    }
}

fn delay(failures: u32) -> Duration {
    FIRST_DELAY.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1))).min(LONGEST_DELAY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[tokio::test]
    async fn a_job_is_with_one_worker_at_a_time_and_comes_again_if_poked() {
        let queue = WorkQueue::default();
        queue.add(1);
        queue.add(1);
        queue.add(2);
        let (first, poke) = queue.next().await;
        let (second, _) = queue.next().await;
        assert_eq!((first, second), (1, 2));
        queue.add(1);
        poke.notified().await;
        assert!(queue.next().now_or_never().is_none(), "1 is taken");
        queue.done(1, &Looked::Rest(None));
        assert_eq!(queue.next().await.0, 1);
        queue.done(1, &Looked::Rest(None));
        queue.done(2, &Looked::Rest(None));
        assert!(queue.next().now_or_never().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_tried_again_later_and_a_poke_does_not_hurry_it() {
        let queue = WorkQueue::default();
        queue.add(1);
        for millis in [200, 400, 800] {
            let (id, _) = queue.next().await;
            let failed = Instant::now();
            queue.add(id);
            queue.done(id, &Looked::Failed);
            queue.next().await;
            assert_eq!(failed.elapsed(), Duration::from_millis(millis));
            // Looked at again at once for the next round.
            queue.done(id, &Looked::Failed);
            queue.lock().failures.entry(id).and_modify(|failures| *failures -= 1);
            queue.add(id);
        }
        queue.forgive();
        assert!(queue.lock().failures.is_empty());
        assert_eq!((delay(1), delay(99)), (FIRST_DELAY, LONGEST_DELAY));
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_ends_at_its_time_or_when_something_happens() {
        let queue = WorkQueue::default();
        queue.add(1);
        queue.next().await;
        let began = Instant::now();
        queue.done(1, &Looked::Rest(Some(began + Duration::from_secs(60))));
        queue.next().await;
        assert_eq!(began.elapsed(), Duration::from_secs(60));
        queue.done(1, &Looked::Rest(Some(Instant::now() + Duration::from_secs(60))));
        queue.add(1);
        assert!(queue.next().now_or_never().is_some());
    }
}
