//! For tests of threads: a driver that does as a test says, and a folder with a simulated machine.

use super::{Driver, DriverError, Event, Listed, Reading, fake::FakeGpu};
use mlad::api::Placement;
use nvidia_ml_sim::{driver::Driver as Sim, machine::Machine, state::State};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// A driver that does as a test says.
#[derive(Default)]
pub(crate) struct Puppet {
    strings: Mutex<Strings>,
    pulled: Condvar,
}

/// Something that happens to the GPUs.
type Happening = Box<dyn FnOnce(&mut Strings) + Send>;

/// What a test says.
#[derive(Default)]
pub(crate) struct Strings {
    /// What reading each GPU answers, by UUID, in the order of their indices.
    pub(crate) gpus: BTreeMap<String, Result<Reading, DriverError>>,
    /// GPUs that do not even tell their UUID.
    pub(crate) nameless: BTreeSet<String>,
    /// GPUs whose calls do not return.
    pub(crate) hung: BTreeSet<String>,
    /// Why the driver answers nothing.
    pub(crate) down: Option<DriverError>,
    /// Why it has no events.
    pub(crate) eventless: Option<DriverError>,
    /// Happens just before events are watched for.
    pub(crate) before_watching: Option<Happening>,
    /// GPUs that were asked something.
    pub(crate) asked: Vec<String>,
    /// GPUs that are being asked something.
    asking: BTreeSet<String>,
}

/// Nothing that a test waits for takes longer.
const LONG: Duration = Duration::from_secs(60);

impl Puppet {
    /// With so many A100-40GB.
    pub(crate) fn with_gpus(count: u32) -> Arc<Self> {
        let puppet = Self::default();
        for index in 0..count {
            let reading = FakeGpu::new(index, "A100-40GB").reading;
            puppet.pull(|strings| strings.gpus.insert(reading.uuid.clone(), Ok(reading)));
        }
        Arc::new(puppet)
    }

    /// Says something.
    pub(crate) fn pull<T>(&self, change: impl FnOnce(&mut Strings) -> T) -> T {
        let said = change(&mut self.strings());
        self.pulled.notify_all();
        said
    }

    fn strings(&self) -> MutexGuard<'_, Strings> {
        self.strings.lock().unwrap()
    }
}

impl Driver for Puppet {
    fn list(&self) -> Result<Vec<Listed>, DriverError> {
        let strings = self.strings();
        if let Some(down) = &strings.down {
            return Err(down.clone());
        }
        let lost = || DriverError::Lost("it fell off the bus".to_owned());
        let uuid = |uuid: &String| if strings.nameless.contains(uuid) { Err(lost()) } else { Ok(uuid.clone()) };
        Ok((0..).zip(strings.gpus.keys()).map(|(index, gpu)| Listed { index, uuid: uuid(gpu) }).collect())
    }

    fn users(&self, _: &str) -> Result<Vec<u32>, DriverError> {
        Ok(Vec::new())
    }

    fn read(&self, gpu: &str) -> Result<Reading, DriverError> {
        let mut strings = self.strings();
        strings.asked.push(gpu.to_owned());
        assert!(strings.asking.insert(gpu.to_owned()), "two calls for one GPU at once");
        let hung = |strings: &mut Strings| strings.hung.contains(gpu);
        let (mut strings, _) = self.pulled.wait_timeout_while(strings, LONG, hung).unwrap();
        strings.asking.remove(gpu);
        strings.gpus[gpu].clone()
    }

    fn create(&self, _: &str, _: u32, _: Placement) -> Result<(), DriverError> {
        Err(DriverError::Denied)
    }

    fn complete(&self, _: &str, _: u32) -> Result<(), DriverError> {
        Err(DriverError::Denied)
    }

    fn destroy(&self, _: &str, _: u32) -> Result<(), DriverError> {
        Err(DriverError::Denied)
    }

    fn watch(
        &self,
        deadline: Instant,
        stopped: &dyn Fn() -> bool,
        event: &mut dyn FnMut(Event),
    ) -> Result<(), DriverError> {
        let mut strings = self.strings();
        if let Some(why) = &strings.eventless {
            return Err(why.clone());
        }
        if let Some(happens) = strings.before_watching.take() {
            happens(&mut strings);
        }
        drop(strings);
        event(Event::Watching);
        // As NVML's own wait: in short pieces, so that a stop is noticed.
        let piece = Duration::from_millis(20);
        while !stopped() && Instant::now() < deadline && self.strings().down.is_none() {
            drop(self.pulled.wait_timeout(self.strings(), piece).unwrap());
        }
        Ok(())
    }
}

/// A folder with a copy of the simulated library and a machine of its own.
pub(crate) struct SimFolder {
    folder: TempDir,
}

impl SimFolder {
    pub(crate) fn new(description: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(nvidia_ml_sim::find_library().unwrap(), folder.path().join("libnvidia-ml.so")).unwrap();
        std::fs::write(folder.path().join("libnvidia-ml.so.toml"), description).unwrap();
        Self { folder }
    }

    pub(crate) fn library(&self) -> PathBuf {
        self.folder.path().join("libnvidia-ml.so")
    }

    /// Makes something happen on the machine.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let machine = Machine::load(&self.folder.path().join("libnvidia-ml.so.toml")).unwrap();
        Sim::start(machine).unwrap().change(|state| Ok(change(state))).unwrap()
    }

    /// From here on the driver answers everything with "unknown error".
    pub(crate) fn break_driver(&self) {
        // Another file by that name: one that is changed in place is not read again.
        let new = self.folder.path().join("nonsense");
        std::fs::write(&new, "nonsense").unwrap();
        std::fs::rename(new, self.folder.path().join("libnvidia-ml.so.state.json")).unwrap();
    }
}
