//! The threads that own the driver.

use super::{Device, Driver, DriverError, Event, Instance, Listed, REFRESH, Reading};
use mlad::api::Placement;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// The GPUs of this machine, each with its thread. Dropped, the threads end after what they are doing.
pub struct Node {
    workers: Arc<Workers>,
    stop: Option<Sender<()>>,
    supervisor: Option<JoinHandle<()>>,
}

/// What a GPU's thread is to do.
#[derive(Debug)]
pub enum Order {
    /// Read the GPU and report.
    Read,
    /// Change what is on it, then read and report.
    Change(Change),
}

/// A change of what is on a GPU. Can be repeated: what is done already is left as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The number of the change, for the report.
    pub id: u64,
    /// Instances to destroy: profile and start.
    pub destroy: Vec<(u32, u32)>,
    /// The instance to make, or to complete where it is half there.
    pub make: Option<(u32, Placement)>,
}

/// What the threads report.
#[derive(Debug)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What was being done.
    pub stage: Stage,
    /// Why it could not be.
    pub error: DriverError,
}

/// What was being done when a change stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
/// How long to wait before a driver that did not answer is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// How often GPUs are looked at while the driver has no events, or one of them does not answer.
const WITHOUT_EVENTS: Duration = Duration::from_secs(10);

type Opener = Box<dyn Fn() -> Result<Arc<dyn Driver>, DriverError> + Send>;

impl Node {
    /// Opens the driver in a thread of its own and reports what there is; tries again while it is absent.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(open: Opener, reports: mpsc::Sender<Report>) -> std::io::Result<Self> {
        let workers = Arc::new(Workers { reports: reports.clone(), threads: Mutex::default() });
        let (stop, stopped) = channel();
        let supervisor = Supervisor { workers: Arc::clone(&workers), open, reports, stopped };
        let supervisor = thread::Builder::new().name("nvml".to_owned()).spawn(move || supervisor.run())?;
        Ok(Self { workers, stop: Some(stop), supervisor: Some(supervisor) })
    }

    /// Gives a GPU's thread an order. False if there is no such GPU, or it has more to do than it can.
    pub fn order(&self, gpu: &str, order: Order) -> bool {
        self.workers.order(gpu, order)
    }

    /// Ends the threads, after what they are doing.
    pub fn stop(mut self) {
        drop(self.stop.take());
        if let Some(supervisor) = self.supervisor.take()
            && supervisor.join().is_err()
        {
            tracing::error!("the thread that watches the GPUs ended by panic");
        }
        self.workers.end();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Without their senders the threads end by themselves.
        self.workers.lock().clear();
    }
}

type Threads = HashMap<String, (SyncSender<Order>, JoinHandle<()>)>;

struct Workers {
    reports: mpsc::Sender<Report>,
    threads: Mutex<Threads>,
}

impl Workers {
    fn lock(&self) -> std::sync::MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn order(&self, gpu: &str, order: Order) -> bool {
        self.lock().get(gpu).is_some_and(|(orders, _)| orders.try_send(order).is_ok())
    }

    /// Ends all threads, after what they have to do.
    fn end(&self) {
        let threads = std::mem::take(&mut *self.lock());
        for (gpu, (orders, thread)) in threads {
            drop(orders);
            if thread.join().is_err() {
                tracing::error!(gpu, "the thread of a GPU ended by panic");
            }
        }
    }

    /// Makes sure that a GPU has a thread.
    fn ensure(&self, gpu: &str, driver: &Arc<dyn Driver>) -> std::io::Result<()> {
        let mut threads = self.lock();
        if threads.get(gpu).is_some_and(|(_, thread)| !thread.is_finished()) {
            return Ok(());
        }
        let (sender, orders) = sync_channel(ORDERS);
        let worker = Worker { gpu: gpu.to_owned(), driver: Arc::clone(driver), orders, reports: self.reports.clone() };
        let thread = thread::Builder::new().name("nvml-gpu".to_owned()).spawn(move || worker.run())?;
        threads.insert(gpu.to_owned(), (sender, thread));
        Ok(())
    }
}

/// Watches for the driver, for GPUs that come and go, and for events.
struct Supervisor {
    workers: Arc<Workers>,
    open: Opener,
    reports: mpsc::Sender<Report>,
    stopped: Receiver<()>,
}

impl Supervisor {
    fn run(self) {
        loop {
            match (self.open)() {
                Ok(driver) => {
                    // Threads of an earlier driver finish what they have to do before another takes over.
                    self.workers.end();
                    self.watch(&driver);
                }
                Err(error) => self.report(Report::Down(error)),
            }
            if self.pause(RETRY) {
                return;
            }
        }
    }

    /// Until the driver fails or we are stopped.
    fn watch(&self, driver: &Arc<dyn Driver>) {
        loop {
            let listed = match driver.list() {
                Ok(listed) => listed,
                Err(error) => return self.report(Report::Down(error)),
            };
            let all_answer = listed.iter().all(|gpu| gpu.uuid.is_ok());
            let present: Vec<String> = listed.iter().filter_map(|gpu| gpu.uuid.clone().ok()).collect();
            self.report(Report::Listed(listed));
            for gpu in &present {
                match self.workers.ensure(gpu, driver) {
                    Ok(()) => drop(self.workers.order(gpu, Order::Read)),
                    Err(error) => tracing::error!(gpu, %error, "no thread for a GPU"),
                }
            }
            let deadline = Instant::now() + if all_answer { REFRESH } else { WITHOUT_EVENTS };
            let mut event = |event| match event {
                Event::Changed(gpu) => drop(self.workers.order(&gpu, Order::Read)),
                Event::Xid { gpu, xid } => {
                    self.report(Report::Xid { gpu: gpu.clone(), xid });
                    self.workers.order(&gpu, Order::Read);
                }
            };
            let stopped = || !matches!(self.stopped.try_recv(), Err(TryRecvError::Empty));
            let pause = match driver.watch(deadline, &stopped, &mut event) {
                Ok(()) => Duration::ZERO,
                Err(error) => {
                    tracing::debug!(%error, "GPU events");
                    WITHOUT_EVENTS
                }
            };
            if self.pause(pause) {
                return;
            }
        }
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
