//! The threads that own the driver: one for each GPU.

use super::{
    Device, Driver, DriverError, Instance, Listed, Reading,
    clear::clear,
    supervisor::{Opener, Pace, Supervisor},
    thread::Thread,
};
use mlad::api::Placement;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};

/// The GPUs of this machine, each with its thread. Dropped, the threads end after what they are doing.
pub struct Node {
    workers: Arc<Workers>,
    stop: Option<Sender<()>>,
    supervisor: Option<Thread>,
}

/// What a GPU's thread is to do.
#[derive(Debug)]
pub enum Order {
    /// Read the GPU and report.
    Read,
    /// Change what is on it, then read and report.
    Change(Change),
    /// Kill what uses it and destroy what is on it, answer, then read and report.
    Clear(oneshot::Sender<Result<(), DriverError>>),
}

/// A change of what is on a GPU. Can be repeated: what is done already is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The number of the change, for the report.
    pub id: u64,
    /// Instances to destroy: profile and start.
    pub destroy: Vec<(u32, u32)>,
    /// The instance to make, or to complete where it is half there.
    pub make: Option<(u32, Placement)>,
}

/// What the threads report.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// The driver does not answer.
    Down(DriverError),
    /// These GPUs are there.
    Listed(Vec<Listed>),
    /// What is on a GPU.
    Gpu {
        /// Its UUID.
        uuid: String,
        /// What was read, or why nothing could be.
        reading: Result<Reading, DriverError>,
        /// The change that was made before, and whether it was.
        change: Option<(u64, Result<(), Failure>)>,
    },
    /// A GPU had a fatal error.
    Xid {
        /// Its UUID.
        gpu: String,
        /// NVIDIA's number of the error, if it is known.
        xid: Option<u64>,
    },
}

/// Where and why a change stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What was being done.
    pub stage: Stage,
    /// Why it could not be.
    pub error: DriverError,
}

/// What was being done when a change stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Reading the GPU.
    Read,
    /// Destroying this instance: profile and start.
    Destroy(u32, u32),
    /// Making the new one.
    Make,
}

/// Orders that may wait for one GPU; changes of one GPU never overlap in columns, so few are ever needed.
const ORDERS: usize = 128;

impl Node {
    /// Opens the driver in a thread of its own and reports what there is; tries again while it is absent.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(open: Opener, reports: mpsc::Sender<Report>) -> std::io::Result<Self> {
        Self::start_at(open, reports, Pace::default())
    }

    /// As [`Self::start`], at another pace.
    pub(super) fn start_at(open: Opener, reports: mpsc::Sender<Report>, pace: Pace) -> std::io::Result<Self> {
        let workers = Arc::new(Workers { reports: reports.clone(), threads: Mutex::default() });
        let (stop, stopped) = channel();
        let supervisor = Supervisor { workers: Arc::clone(&workers), open, reports, stopped, pace };
        let supervisor = Thread::spawn("nvml", move || supervisor.run())?;
        Ok(Self { workers, stop: Some(stop), supervisor: Some(supervisor) })
    }

    /// Gives a GPU's thread an order. False if there is no such GPU, or it has more to do than it can.
    pub fn order(&self, gpu: &str, order: Order) -> bool {
        self.workers.order(gpu, order)
    }

    /// Ends the threads, after what they are doing; those that a call of the driver still holds after
    /// `patience` are left to it.
    pub fn stop(mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        drop(self.stop.take());
        if let Some(supervisor) = self.supervisor.take()
            && supervisor.join_by(deadline).is_err()
        {
            tracing::error!("the driver does not return from a call; its thread is left behind");
        }
        self.workers.end(deadline);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Without their senders the threads end by themselves.
        self.workers.lock().at_work.clear();
    }
}

/// The threads of the GPUs, by UUID.
pub(super) struct Workers {
    reports: mpsc::Sender<Report>,
    threads: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    /// Those that take orders.
    at_work: HashMap<String, (SyncSender<Order>, Thread)>,
    /// Those that were to end and that a call of the driver still holds.
    hung: HashMap<String, Thread>,
}

impl Workers {
    fn lock(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a GPU's thread an order.
    pub(super) fn order(&self, gpu: &str, order: Order) -> bool {
        self.lock().at_work.get(gpu).is_some_and(|(orders, _)| orders.try_send(order).is_ok())
    }

    /// Ends all threads, after what they have to do; those that have not ended at the deadline are left
    /// behind.
    pub(super) fn end(&self, deadline: Instant) {
        let at_work = std::mem::take(&mut self.lock().at_work);
        // All of them are told before the first is waited for.
        let threads: Vec<_> = at_work.into_iter().map(|(gpu, (_, thread))| (gpu, thread)).collect();
        for (gpu, thread) in threads {
            if let Err(thread) = thread.join_by(deadline) {
                tracing::error!(gpu, "the driver does not return from a call for a GPU; its thread is left behind");
                self.lock().hung.insert(gpu, thread);
            }
        }
    }

    /// Makes sure that a GPU has a thread. There is never a second one beside one that hangs: calls for one
    /// GPU do not overlap.
    ///
    /// # Errors
    /// Why it has none.
    pub(super) fn ensure(&self, gpu: &str, driver: &Arc<dyn Driver>) -> Result<(), DriverError> {
        let mut threads = self.lock();
        if threads.at_work.get(gpu).is_some_and(|(_, thread)| !thread.is_finished()) {
            return Ok(());
        }
        if threads.hung.get(gpu).is_some_and(|thread| !thread.is_finished()) {
            return Err(DriverError::Lost("a call of the driver for it has not returned".to_owned()));
        }
        threads.hung.remove(gpu);
        let (sender, orders) = sync_channel(ORDERS);
        let worker = Worker { gpu: gpu.to_owned(), driver: Arc::clone(driver), orders, reports: self.reports.clone() };
        let thread = Thread::spawn("nvml-gpu", move || worker.run())
            .map_err(|error| DriverError::Other(format!("the system gives no thread for it: {error}")))?;
        threads.at_work.insert(gpu.to_owned(), (sender, thread));
        Ok(())
    }
}

/// Does everything for one GPU, in order.
struct Worker {
    gpu: String,
    driver: Arc<dyn Driver>,
    orders: Receiver<Order>,
    reports: mpsc::Sender<Report>,
}

impl Worker {
    fn run(self) {
        while let Ok(order) = self.orders.recv() {
            let change = match order {
                Order::Read => None,
                Order::Change(change) => Some((change.id, self.change(&change))),
                Order::Clear(reply) => {
                    // Who asked may have gone.
                    drop(reply.send(clear(&*self.driver, &self.gpu)));
                    None
                }
            };
            let reading = self.driver.read(&self.gpu);
            let report = Report::Gpu { uuid: self.gpu.clone(), reading, change };
            if self.reports.blocking_send(report).is_err() {
                return;
            }
        }
    }

    fn change(&self, change: &Change) -> Result<(), Failure> {
        let failure = |stage| move |error| Failure { stage, error };
        let reading = self.driver.read(&self.gpu).map_err(failure(Stage::Read))?;
        for (profile, start) in change.destroy.iter().copied() {
            let Some(instance) = find(&reading.instances, profile, start) else { continue };
            match self.driver.destroy(&self.gpu, instance.id) {
                Ok(()) | Err(DriverError::NotFound) => {}
                Err(error) => return Err(failure(Stage::Destroy(profile, start))(error)),
            }
        }
        let Some((profile, placement)) = change.make else { return Ok(()) };
        let there = find(&reading.instances, profile, placement.start);
        let make = match there.filter(|_| !change.destroy.contains(&(profile, placement.start))) {
            Some(Instance { device: Device::Whole(_), .. }) => Ok(()),
            Some(Instance { id, device: Device::Missing, .. }) => self.driver.complete(&self.gpu, *id),
            Some(_) => Err(DriverError::NoRoom),
            None => self.driver.create(&self.gpu, profile, placement),
        };
        make.map_err(failure(Stage::Make))
    }
}

fn find(instances: &[Instance], profile: u32, start: u32) -> Option<&Instance> {
    instances.iter().find(|instance| instance.profile == profile && instance.placement.start == start)
}
