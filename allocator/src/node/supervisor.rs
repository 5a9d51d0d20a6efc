//! The thread that watches: for the driver, for GPUs that come and go, and for events.

use super::{Driver, DriverError, Event, REFRESH, worker::Order, worker::Report, worker::Workers};
use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// Opens the driver.
pub(super) type Opener = Box<dyn Fn() -> Result<Arc<dyn Driver>, DriverError> + Send>;

/// How long things are waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Everything is read anew this often though no event came.
    pub(super) refresh: Duration,
    /// GPUs are looked at this often while the driver has no events, or one of them does not answer.
    pub(super) without_events: Duration,
    /// A driver that did not answer is tried again after this.
    pub(super) retry: Duration,
    /// Threads of a driver that failed may take this long to end before another takes over.
    pub(super) take_over: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            refresh: REFRESH,
            without_events: Duration::from_secs(10),
            retry: Duration::from_secs(30),
            take_over: Duration::from_secs(10),
        }
    }
}

/// Watches for the driver, for GPUs that come and go, and for events.
pub(super) struct Supervisor {
    pub(super) workers: Arc<Workers>,
    pub(super) open: Opener,
    pub(super) reports: mpsc::Sender<Report>,
    pub(super) stopped: Receiver<()>,
    pub(super) pace: Pace,
}

impl Supervisor {
    /// Until we are stopped.
    pub(super) fn run(self) {
        loop {
            match (self.open)() {
                Ok(driver) => {
                    // Threads of an earlier driver finish what they have to do before another takes over; a
                    // GPU whose thread cannot is left to it.
                    self.workers.end(Instant::now() + self.pace.take_over);
                    self.watch(&driver);
                }
                Err(error) => self.report(Report::Down(error)),
            }
            if self.pause(self.pace.retry) {
                return;
            }
        }
    }

    /// Until the driver fails or we are stopped.
    fn watch(&self, driver: &Arc<dyn Driver>) {
        let mut failed = false;
        loop {
            let listed = match driver.list() {
                Ok(listed) => listed,
                Err(error) => return self.report(Report::Down(error)),
            };
            let mut all_answer = listed.iter().all(|gpu| gpu.uuid.is_ok());
            let present: Vec<String> = listed.iter().filter_map(|gpu| gpu.uuid.clone().ok()).collect();
            self.report(Report::Listed(listed));
            for gpu in &present {
                if let Err(error) = self.workers.ensure(gpu, driver) {
                    all_answer = false;
                    self.report(Report::Gpu { uuid: gpu.clone(), reading: Err(error), change: None });
                }
            }
            let read_all = || present.iter().for_each(|gpu| self.read(gpu));
            let mut watching = false;
            let mut event = |event| match event {
                // Not before: what happened between a reading and the first event would be missed.
                Event::Watching => {
                    watching = true;
                    read_all();
                }
                Event::Changed(gpu) => self.read(&gpu),
                Event::Xid { gpu, xid } => {
                    self.report(Report::Xid { gpu: gpu.clone(), xid });
                    self.read(&gpu);
                }
            };
            let deadline = Instant::now() + if all_answer { self.pace.refresh } else { self.pace.without_events };
            let stopped = || !matches!(self.stopped.try_recv(), Err(TryRecvError::Empty));
            let watched = driver.watch(deadline, &stopped, &mut event);
            if !watching {
                read_all();
            }
            // What went wrong once (a GPU was lost in this moment, say) is begun anew at once; what goes wrong
            // again is likely to go on so.
            let failed_before = std::mem::replace(&mut failed, watched.is_err());
            if let Err(error) = watched {
                tracing::debug!(%error, "GPU events");
            }
            if self.pause(if failed && failed_before { self.pace.without_events } else { Duration::ZERO }) {
                return;
            }
        }
    }

    /// Has a GPU read. One whose thread has too much to do already is read by what it does.
    fn read(&self, gpu: &str) {
        self.workers.order(gpu, Order::Read);
    }

    fn report(&self, report: Report) {
        // Nobody listens any more: we are being stopped.
        drop(self.reports.blocking_send(report));
    }

    /// Waits; true when we are to stop.
    fn pause(&self, time: Duration) -> bool {
        !matches!(self.stopped.recv_timeout(time), Err(RecvTimeoutError::Timeout))
    }
}
