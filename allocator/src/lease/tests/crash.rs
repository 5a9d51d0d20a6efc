//! The allocator dies at each point where it writes, and is started again.

use super::super::{
    embedded::{Embedded, Gpus, Opener, Settings, lock, system_clock},
    store::Store,
};
use crate::{
    Allocate, AllocatorError, LeaseRequest, LeaseState,
    node::{Driver, DriverError, Event, Listed, NvmlDriver, Reading},
};
use mlad::api::{Lease, Placement};
use nvidia_ml_sim::{
    driver::Driver as Sim,
    machine::Machine,
    state::{Fault, FaultKind},
};
use std::{
    collections::BTreeMap,
    future::pending,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{sync::Notify, time::timeout};

/// Far more than anything here takes.
const BOUND: Duration = Duration::from_secs(60);

/// Death at the nth point.
pub(in crate::lease) struct Crash {
    left: AtomicI64,
    died: Notify,
    /// Held while the driver is in a call, which death does not cut short.
    calling: Mutex<()>,
}

impl Crash {
    fn after(points: i64) -> Arc<Self> {
        Arc::new(Self { left: AtomicI64::new(points), died: Notify::new(), calling: Mutex::default() })
    }

    /// Whether this is the end, or after it.
    fn hit(&self) -> bool {
        let left = self.left.fetch_sub(1, Ordering::SeqCst);
        if left == 0 {
            self.died.notify_one();
        }
        left <= 0
    }

    /// A point of the database: who is dead never returns.
    pub(in crate::lease) async fn point(&self) {
        if self.hit() {
            pending::<()>().await;
        }
    }
}

/// The simulated driver, of a process that dies.
struct Mortal {
    driver: NvmlDriver,
    sim: Sim,
    crash: Arc<Crash>,
}

impl Mortal {
    /// Does `whole`; or dies before, in the middle of (`half`), or after it.
    fn step(&self, half: impl FnOnce(), whole: impl FnOnce() -> Result<(), DriverError>) -> Result<(), DriverError> {
        let dead = || Err(DriverError::Other("dead".to_owned()));
        let _calling = self.crash.calling.lock().unwrap();
        if self.crash.hit() {
            return dead();
        }
        if self.crash.hit() {
            half();
            return dead();
        }
        let result = whole();
        if self.crash.hit() { dead() } else { result }
    }
}

impl Driver for Mortal {
    fn list(&self) -> Result<Vec<Listed>, DriverError> {
        self.driver.list()
    }

    fn users(&self, gpu: &str) -> Result<Vec<u32>, DriverError> {
        self.driver.users(gpu)
    }

    fn read(&self, gpu: &str) -> Result<Reading, DriverError> {
        self.driver.read(gpu)
    }

    fn create(&self, gpu: &str, profile: u32, placement: Placement) -> Result<(), DriverError> {
        let half = || {
            let placement = nvidia_ml_sim::facts::Placement { start: placement.start, size: placement.size };
            self.sim.change(|state| state.create_gpu_instance(0, 535, profile, Some(placement))).unwrap();
        };
        self.step(half, || self.driver.create(gpu, profile, placement))
    }

    fn complete(&self, gpu: &str, instance: u32) -> Result<(), DriverError> {
        self.step(|| {}, || self.driver.complete(gpu, instance))
    }

    fn destroy(&self, gpu: &str, instance: u32) -> Result<(), DriverError> {
        let half = || {
            let fault =
                Fault { kind: FaultKind::GpuInstanceLeft, gpu: None, on: None, times: Some(1), milliseconds: None };
            let lay = |state: &mut nvidia_ml_sim::state::State| {
                state.lay(fault);
                Ok(())
            };
            self.sim.change(lay).unwrap();
            self.driver.destroy(gpu, instance).unwrap_err();
        };
        self.step(half, || self.driver.destroy(gpu, instance))
    }

    fn watch(
        &self,
        deadline: Instant,
        stopped: &dyn Fn() -> bool,
        event: &mut dyn FnMut(Event),
    ) -> Result<(), DriverError> {
        self.driver.watch(deadline, stopped, event)
    }
}

async fn start(folder: &Path, crash: Arc<Crash>) -> Arc<Embedded> {
    let library = folder.join("libnvidia-ml.so");
    let settings =
        Settings { gpus: Gpus::Library(library.clone()), ..Settings::new(folder.join("allocator.db"), "node-1") };
    let lock = lock(&settings.database).unwrap();
    let mut store = Store::open(&settings.database).await.unwrap();
    store.crash = Some(Arc::clone(&crash));
    let machine = Machine::load(&folder.join("libnvidia-ml.so.toml")).unwrap();
    let opener: Opener = Box::new(move || {
        let driver = NvmlDriver::open(Some(&library))?;
        let sim = Sim::start(machine.clone()).unwrap();
        Ok(Arc::new(Mortal { driver, sim, crash: Arc::clone(&crash) }))
    });
    Embedded::start_with(settings, Some(opener), store, lock, system_clock()).await.unwrap()
}

/// What the allocator has answered, and so must stand by.
#[derive(Default)]
struct Promised {
    leases: BTreeMap<String, Lease>,
    released: Vec<String>,
    greatest_fence: u64,
}

impl Promised {
    async fn get(&mut self, allocator: &Embedded, workload: &str, need: &str) {
        if self.leases.contains_key(workload) || self.released.iter().any(|released| released == workload) {
            return;
        }
        let request = LeaseRequest::new(workload, "alice", need.parse().unwrap());
        let mut state = match allocator.request(&request).await {
            // Released, and the answer was lost.
            Err(AllocatorError::Ended(_)) => return self.released.push(workload.to_owned()),
            state => state.unwrap(),
        };
        let mut seen = 0;
        while matches!(state, LeaseState::Waiting(_)) {
            seen = timeout(BOUND, allocator.changed(seen)).await.expect("nothing changes any more").unwrap();
            state = allocator.state(workload).await.unwrap();
        }
        let LeaseState::Granted(lease) = state else { panic!("{workload}: {state:?}") };
        self.leases.insert(workload.to_owned(), lease);
    }

    async fn release(&mut self, allocator: &Embedded, workload: &str) {
        // From here on until the answer it may be either.
        self.leases.remove(workload);
        allocator.release(workload).await.unwrap();
        self.released.push(workload.to_owned());
    }

    /// The same steps each time; those that were answered are not taken again.
    async fn live(&mut self, allocator: &Embedded) {
        self.get(allocator, "a-1", "1g.5gb").await;
        self.get(allocator, "b-1", "2g.10gb").await;
        self.release(allocator, "a-1").await;
        self.release(allocator, "b-1").await;
        self.get(allocator, "c-1", "7g.40gb").await;
        self.release(allocator, "c-1").await;
        self.get(allocator, "d-1", "3g.20gb").await;
        self.get(allocator, "e-1", "cpu").await;
    }

    /// What was answered is so, and agrees with the driver; fences grow.
    async fn check(&mut self, allocator: &Embedded, sim: &Sim) {
        for (workload, promised) in &self.leases {
            let lease = allocator.renew(workload, promised.fence).await.unwrap();
            assert_eq!(lease.slices, promised.slices);
            self.greatest_fence = self.greatest_fence.max(lease.fence);
        }
        for workload in &self.released {
            assert!(matches!(allocator.state(workload).await.unwrap(), LeaseState::Ended { .. }), "{workload}");
        }
        let leases = allocator.leases().await.unwrap();
        let state = sim.state().unwrap();
        let there: Vec<&str> = state.gpus[0].mig_devices().map(|(_, compute)| compute.uuid.as_str()).collect();
        let mut uuids: Vec<&String> = leases.iter().flat_map(|lease| &lease.uuids).collect();
        assert!(uuids.iter().all(|uuid| there.contains(&uuid.as_str())), "{uuids:?} of {there:?}");
        let count = uuids.len();
        uuids.sort();
        uuids.dedup();
        assert_eq!(uuids.len(), count, "a slice has two holders");
    }
}

/// One life that ends at the nth point, and the next. False if it ended before that.
async fn lives(points: i64) -> bool {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(nvidia_ml_sim::find_library().unwrap(), folder.path().join("libnvidia-ml.so")).unwrap();
    let description = folder.path().join("libnvidia-ml.so.toml");
    std::fs::write(&description, "[[gpu]]\nmodel = \"A100-40GB\"\nmig = true\n").unwrap();
    let sim = Sim::start(Machine::load(&description).unwrap()).unwrap();
    let crash = Crash::after(points);
    let mut promised = Promised::default();
    let mut first = None;
    let died = tokio::select! {
        () = async {
            let allocator = first.insert(start(folder.path(), Arc::clone(&crash)).await);
            promised.live(allocator).await;
        } => false,
        () = crash.died.notified() => true,
    };
    if let Some(allocator) = first {
        if !died {
            allocator.stop().await;
            return false;
        }
        allocator.kill().await;
    }
    // The call that the driver was in comes to its end before anybody can follow.
    drop(crash.calling.lock().unwrap());
    let allocator = start(folder.path(), Crash::after(i64::MAX)).await;
    promised.check(&allocator, &sim).await;
    let before = promised.greatest_fence;
    promised.live(&allocator).await;
    promised.check(&allocator, &sim).await;
    assert!(promised.leases.values().all(|lease| lease.fence >= before));
    assert_eq!(promised.leases.len(), 2);
    // What was left half-made is set right, in its own time.
    let half_made = || sim.state().unwrap().gpus[0].instances.iter().any(|instance| instance.compute.len() != 1);
    let mut seen = 0;
    while half_made() {
        let changed = timeout(BOUND, allocator.changed(seen)).await;
        seen = changed.expect("something is left half-made").unwrap();
    }
    allocator.kill().await;
    true
}

#[tokio::test(flavor = "multi_thread")]
async fn death_at_every_point_of_writing() {
    let mut points = 0;
    loop {
        let eight = futures::future::join_all((points..points + 8).map(lives));
        let died = timeout(BOUND * 5, eight).await.expect("a life has no end");
        points += died.iter().filter(|died| **died).count() as i64;
        if died.contains(&false) {
            break;
        }
    }
    assert!(points > 30, "only {points} points");
}
