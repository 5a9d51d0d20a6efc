//! The simulated machine as it is now, and everything that can happen to it: pure, all of it saved.
//!
//! * here — GPUs, MIG mode, reset and reboot, processes, events.
//! * `instances` — the life of GPU and compute instances.
//! * `fault` — what goes wrong on demand.
//!
//! A method either does all it says or changes nothing (but for a fault that it used up).

mod fault;
mod instances;

use std::collections::VecDeque;

use nvml_wrapper_sys::bindings as nvml;
use serde::{Deserialize, Serialize};

pub use fault::{Fault, FaultKind, InstanceKind};
pub use instances::Destroy;

use crate::facts::{self, Generation, Model, Placement};
use crate::geometry::{Rules, Slot};
use crate::machine::Machine;
use crate::refusal::Refusal;

/// The format of the state file.
pub const STATE_VERSION: u32 = 1;
/// Events kept for those who wait for them; older ones are dropped.
const MAX_EVENTS: usize = 1024;
/// The XID of a GPU that has fallen off the bus.
const XID_FALLEN_OFF_THE_BUS: u64 = 79;

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// New with every reboot.
    pub boot_id: String,
    /// The next handle of an instance; never used twice.
    next_key: u64,
    /// The number of the next event; begins at 1.
    next_event: u64,
    /// In NVML's order.
    pub gpus: Vec<Gpu>,
    /// What is still to go wrong.
    pub faults: Vec<Fault>,
    events: VecDeque<Event>,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Its model's key in the facts.
    pub model: String,
    /// `GPU-…`, for as long as the state file lives.
    pub uuid: String,
    /// Whether it is divided now.
    pub mig: bool,
    /// Whether it will be after the next reset.
    pub mig_pending: bool,
    /// Fallen off the bus.
    pub lost: bool,
    /// Uncorrectable memory errors since the last reset.
    pub uncorrected_errors: u64,
    /// What runs on the whole GPU.
    pub processes: Vec<Process>,
    /// What it is divided into.
    pub instances: Vec<GpuInstance>,
}

/// A GPU instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuInstance {
    /// Its handle.
    pub key: u64,
    /// NVML's id on its GPU.
    pub id: u32,
    /// NVML's id of its profile.
    pub profile: u32,
    /// First memory slice.
    pub start: u32,
    /// Memory slices.
    pub size: u32,
    /// Its compute instances.
    pub compute: Vec<ComputeInstance>,
}

/// A compute instance: with it a MIG device begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ComputeInstance {
    /// Its handle.
    pub key: u64,
    /// NVML's id in its GPU instance.
    pub id: u32,
    /// NVML's id of its profile.
    pub profile: u32,
    /// First compute slice.
    pub start: u32,
    /// Compute slices.
    pub size: u32,
    /// `MIG-…`: new each time.
    pub uuid: String,
    /// What runs on it.
    pub processes: Vec<Process>,
}

/// A process that computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// Memory it holds on the device, in MiB.
    pub memory_mib: u64,
}

/// Something that happened, for those who wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Rises by one with every event.
    pub number: u64,
    /// The GPU it is about.
    pub gpu: u32,
    /// `nvmlEventType…`.
    pub kind: u64,
    /// The XID, of an XID event.
    pub data: u64,
    /// The GPU instance it is about, if it is about one.
    pub gpu_instance: Option<u32>,
    /// The compute instance.
    pub compute_instance: Option<u32>,
}

/// Where a process runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// A whole GPU, by index.
    Gpu(u32),
    /// A MIG device, by the key of its compute instance.
    Mig(u64),
}

/// A GPU instance and where it is.
#[derive(Debug, Clone, Copy)]
pub struct FoundGpuInstance<'a> {
    /// Index of its GPU.
    pub gpu_index: u32,
    /// Its GPU.
    pub gpu: &'a Gpu,
    /// Itself.
    pub instance: &'a GpuInstance,
}

/// A compute instance and where it is.
#[derive(Debug, Clone, Copy)]
pub struct FoundComputeInstance<'a> {
    /// The GPU instance it is in.
    pub parent: FoundGpuInstance<'a>,
    /// Itself.
    pub compute: &'a ComputeInstance,
}

impl GpuInstance {
    /// Where it lies.
    #[must_use]
    pub fn placement(&self) -> Placement {
        Placement { start: self.start, size: self.size }
    }

    /// Where its compute instances lie.
    #[must_use]
    pub fn compute_placements(&self) -> Vec<Placement> {
        self.compute.iter().map(ComputeInstance::placement).collect()
    }
}

impl ComputeInstance {
    /// Where it lies in its GPU instance.
    #[must_use]
    pub fn placement(&self) -> Placement {
        Placement { start: self.start, size: self.size }
    }
}

impl Gpu {
    fn new(model: &Model, mig: bool) -> Self {
        Self {
            model: model.key.clone(),
            uuid: format!("GPU-{}", uuid()),
            mig,
            mig_pending: mig,
            lost: false,
            uncorrected_errors: 0,
            processes: Vec::new(),
            instances: Vec::new(),
        }
    }

    /// What the facts say of it.
    ///
    /// # Errors
    /// [`Refusal::Unknown`] when they say nothing; a loaded state was checked for that.
    pub fn model(&self) -> Result<&'static Model, Refusal> {
        facts::model(&self.model).ok_or(Refusal::Unknown)
    }

    /// The rules it obeys under driver branch `driver_branch`.
    ///
    /// # Errors
    /// As [`Gpu::model`].
    pub fn rules(&self, driver_branch: u32) -> Result<Rules<'static>, Refusal> {
        Ok(Rules::new(self.model()?, driver_branch))
    }

    /// Its instances as the rules see them.
    ///
    /// # Errors
    /// As [`Gpu::model`].
    pub fn slots(&self) -> Result<Vec<Slot<'static>>, Refusal> {
        let model = self.model()?;
        let slot = |instance: &GpuInstance| {
            let profile = model.profile(instance.profile).ok_or(Refusal::Unknown)?;
            Ok(Slot { profile, placement: instance.placement() })
        };
        self.instances.iter().map(slot).collect()
    }

    /// Its compute instances, in the order of their ids: the MIG devices.
    pub fn mig_devices(&self) -> impl Iterator<Item = (&GpuInstance, &ComputeInstance)> {
        let mut devices: Vec<_> =
            self.instances.iter().flat_map(|one| one.compute.iter().map(move |compute| (one, compute))).collect();
        devices.sort_by_key(|(instance, compute)| (instance.id, compute.id));
        devices.into_iter()
    }

    fn is_busy(&self) -> bool {
        !self.processes.is_empty() || self.mig_devices().any(|(_, compute)| !compute.processes.is_empty())
    }

    /// What a reset of the GPU leaves of it.
    fn reset(&mut self) {
        self.instances.clear();
        self.processes.clear();
        self.mig = self.mig_pending;
        self.lost = false;
        self.uncorrected_errors = 0;
    }
}

impl State {
    /// The machine as it is when it is started for the first time.
    #[must_use]
    pub fn first_start(machine: &Machine) -> Self {
        let mut state = Self {
            version: STATE_VERSION,
            boot_id: uuid(),
            next_key: 1,
            next_event: 1,
            gpus: Vec::new(),
            faults: Vec::new(),
            events: VecDeque::new(),
        };
        state.agree_with(machine);
        for fault in &machine.faults {
            state.lay(fault.clone());
        }
        state
    }

    /// Takes in and out the GPUs that the description gained and lost since. A GPU whose model changed is
    /// another GPU.
    pub fn agree_with(&mut self, machine: &Machine) {
        self.gpus.truncate(machine.gpus.len());
        for (index, wanted) in machine.gpus.iter().enumerate() {
            match self.gpus.get_mut(index) {
                Some(gpu) if gpu.model == wanted.model.key => {}
                Some(gpu) => *gpu = Gpu::new(wanted.model, wanted.mig),
                None => self.gpus.push(Gpu::new(wanted.model, wanted.mig)),
            }
        }
    }

    /// What is wrong with a state that was read from a file, if anything: models and profiles this library
    /// does not know.
    ///
    /// # Errors
    /// What it is.
    pub fn check(&self) -> Result<(), String> {
        if self.version != STATE_VERSION {
            return Err(format!("it is of version {}, this library knows {STATE_VERSION}", self.version));
        }
        for (index, gpu) in self.gpus.iter().enumerate() {
            gpu.slots().map_err(|_| format!("GPU {index} has a model or profile that is not known"))?;
        }
        Ok(())
    }

    /// GPU `index`.
    ///
    /// # Errors
    /// [`Refusal::InvalidArgument`] when there is none, [`Refusal::GpuIsLost`].
    pub fn gpu(&self, index: u32) -> Result<&Gpu, Refusal> {
        let gpu = self.any_gpu(index)?;
        if gpu.lost { Err(Refusal::GpuIsLost) } else { Ok(gpu) }
    }

    /// The GPU instance with handle `key`.
    ///
    /// # Errors
    /// [`Refusal::InvalidArgument`] when it is gone, [`Refusal::GpuIsLost`].
    pub fn gpu_instance(&self, key: u64) -> Result<FoundGpuInstance<'_>, Refusal> {
        let (gpu_index, gpu, instance) = self
            .indexed()
            .find_map(|(index, gpu)| Some((index, gpu, gpu.instances.iter().find(|instance| instance.key == key)?)))
            .ok_or(Refusal::InvalidArgument)?;
        self.gpu(gpu_index)?;
        Ok(FoundGpuInstance { gpu_index, gpu, instance })
    }

    /// The compute instance with handle `key`.
    ///
    /// # Errors
    /// [`Refusal::InvalidArgument`] when it is gone, [`Refusal::GpuIsLost`].
    pub fn compute_instance(&self, key: u64) -> Result<FoundComputeInstance<'_>, Refusal> {
        for (gpu_index, gpu) in self.indexed() {
            for instance in &gpu.instances {
                if let Some(compute) = instance.compute.iter().find(|compute| compute.key == key) {
                    self.gpu(gpu_index)?;
                    return Ok(FoundComputeInstance { parent: FoundGpuInstance { gpu_index, gpu, instance }, compute });
                }
            }
        }
        Err(Refusal::InvalidArgument)
    }

    /// The device with this UUID.
    ///
    /// # Errors
    /// [`Refusal::NotFound`], [`Refusal::GpuIsLost`].
    pub fn device_by_uuid(&self, uuid: &str) -> Result<Device, Refusal> {
        for (index, gpu) in self.indexed() {
            let mig = gpu.mig_devices().find(|(_, compute)| compute.uuid == uuid);
            let device = match mig {
                Some((_, compute)) => Device::Mig(compute.key),
                None if gpu.uuid == uuid => Device::Gpu(index),
                None => continue,
            };
            return if gpu.lost { Err(Refusal::GpuIsLost) } else { Ok(device) };
        }
        Err(Refusal::NotFound)
    }

    /// Asks for MIG mode on or off. Answers whether it is so now: [`Refusal::ResetRequired`] on Ampere, where
    /// it waits for the next reset, [`Refusal::InUse`] while instances or processes stand in the way.
    ///
    /// # Errors
    /// [`Refusal::NotSupported`] where nothing is known to divide the GPU into, [`Refusal::GpuIsLost`].
    pub fn set_mig_mode(&mut self, index: u32, on: bool) -> Result<Result<(), Refusal>, Refusal> {
        let model = self.gpu(index)?.model()?;
        if model.profiles.is_empty() {
            return Err(Refusal::NotSupported);
        }
        let gpu = self.gpu_mut(index)?;
        gpu.mig_pending = on;
        if gpu.mig == on {
            return Ok(Ok(()));
        }
        if model.generation == Generation::Ampere {
            return Ok(Err(Refusal::ResetRequired));
        }
        if !gpu.instances.is_empty() || gpu.is_busy() {
            return Ok(Err(Refusal::InUse));
        }
        gpu.mig = on;
        self.tell_of_mig_change(index);
        Ok(Ok(()))
    }

    /// A reset of one GPU: its instances are gone, a pending MIG mode is in force, a lost GPU is back.
    ///
    /// # Errors
    /// [`Refusal::InvalidArgument`] when there is no such GPU, [`Refusal::InUse`] while processes run on it.
    pub fn reset_gpu(&mut self, index: u32) -> Result<(), Refusal> {
        let gpu = self.gpu_mut(index)?;
        if gpu.is_busy() && !gpu.lost {
            return Err(Refusal::InUse);
        }
        gpu.reset();
        self.tell_of_mig_change(index);
        Ok(())
    }

    /// A reboot of the machine: as [`State::reset_gpu`] of every GPU, whatever ran, and with a new boot id.
    /// Faults laid for later stay.
    pub fn reboot(&mut self) {
        self.gpus.iter_mut().for_each(Gpu::reset);
        self.boot_id = uuid();
        for index in (0..).take(self.gpus.len()) {
            self.tell_of_mig_change(index);
        }
    }

    /// A critical error of a GPU, or of one instance on it.
    ///
    /// # Errors
    /// [`Refusal::InvalidArgument`] when there is no such GPU, [`Refusal::NotFound`] when it has no such
    /// instance.
    pub fn xid(&mut self, index: u32, code: u64, gpu_instance: Option<u32>) -> Result<(), Refusal> {
        let gpu = self.any_gpu(index)?;
        if gpu_instance.is_some_and(|id| gpu.instances.iter().all(|instance| instance.id != id)) {
            return Err(Refusal::NotFound);
        }
        self.tell(index, nvml::nvmlEventTypeXidCriticalError, code, gpu_instance);
        Ok(())
    }

    /// `count` more uncorrectable memory errors of a GPU.
    ///
    /// # Errors
    /// [`Refusal::InvalidArgument`] when there is no such GPU, [`Refusal::GpuIsLost`].
    pub fn memory_errors(&mut self, index: u32, count: u64) -> Result<(), Refusal> {
        self.gpu(index)?;
        let gpu = self.gpu_mut(index)?;
        gpu.uncorrected_errors = gpu.uncorrected_errors.saturating_add(count);
        self.tell(index, nvml::nvmlEventTypeDoubleBitEccError, 0, None);
        Ok(())
    }

    /// A process begins to compute on `device`, or to hold another amount of memory.
    ///
    /// # Errors
    /// [`Refusal::InvalidArgument`] when the device is gone, [`Refusal::NotSupported`] for a whole GPU that is
    /// divided, [`Refusal::InsufficientResources`] when its memory does not suffice.
    pub fn start_process(&mut self, device: Device, process: Process) -> Result<(), Refusal> {
        let capacity = self.memory_mib(device)?.unwrap_or(u64::MAX);
        let sharing = self.processes_sharing_memory(device)?;
        let others = sharing.iter().filter(|other| other.pid != process.pid);
        let held = others.map(|other| other.memory_mib).sum::<u64>();
        if held.saturating_add(process.memory_mib) > capacity {
            return Err(Refusal::InsufficientResources);
        }
        let processes = self.processes_mut(device)?;
        processes.retain(|other| other.pid != process.pid);
        processes.push(process);
        Ok(())
    }

    /// A process ends, wherever it computes. Answers whether there was one.
    pub fn end_process(&mut self, pid: u32) -> bool {
        let mut ended = false;
        let of_gpu = |gpu: &'_ mut Gpu| {
            let on_slices = gpu.instances.iter_mut().flat_map(|one| &mut one.compute).map(|one| &mut one.processes);
            for processes in std::iter::once(&mut gpu.processes).chain(on_slices) {
                let before = processes.len();
                processes.retain(|process| process.pid != pid);
                ended |= processes.len() != before;
            }
        };
        self.gpus.iter_mut().for_each(of_gpu);
        ended
    }

    /// Memory of a device in MiB; none where the facts do not tell.
    ///
    /// # Errors
    /// [`Refusal::InvalidArgument`] when it is gone, [`Refusal::GpuIsLost`].
    pub fn memory_mib(&self, device: Device) -> Result<Option<u64>, Refusal> {
        match device {
            Device::Gpu(index) => Ok(self.gpu(index)?.model()?.memory_mib),
            Device::Mig(key) => {
                let parent = self.compute_instance(key)?.parent;
                let profile = parent.gpu.model()?.profile(parent.instance.profile).ok_or(Refusal::Unknown)?;
                Ok(Some(profile.memory_mib))
            }
        }
    }

    /// The processes whose memory comes out of the same place as that of `device`: compute instances share
    /// the memory of their GPU instance.
    ///
    /// # Errors
    /// [`Refusal::InvalidArgument`] when the device is gone, [`Refusal::GpuIsLost`].
    pub fn processes_sharing_memory(&self, device: Device) -> Result<Vec<Process>, Refusal> {
        let of_slice = |instance: &GpuInstance| -> Vec<Process> {
            instance.compute.iter().flat_map(|compute| compute.processes.clone()).collect()
        };
        match device {
            Device::Gpu(index) => {
                let gpu = self.gpu(index)?;
                let whole = gpu.processes.iter().copied();
                Ok(whole.chain(gpu.instances.iter().flat_map(of_slice)).collect())
            }
            Device::Mig(key) => Ok(of_slice(self.compute_instance(key)?.parent.instance)),
        }
    }

    /// The number of the newest event; 0 before the first.
    #[must_use]
    pub fn newest_event(&self) -> u64 {
        self.next_event.saturating_sub(1)
    }

    /// Events after number `seen`, oldest first.
    pub fn events_after(&self, seen: u64) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(move |event| event.number > seen)
    }

    fn processes_mut(&mut self, device: Device) -> Result<&mut Vec<Process>, Refusal> {
        match device {
            Device::Gpu(index) if self.gpu(index)?.mig => Err(Refusal::NotSupported),
            Device::Gpu(index) => Ok(&mut self.gpu_mut(index)?.processes),
            Device::Mig(key) => {
                self.compute_instance(key)?;
                let mut all = self.gpus.iter_mut().flat_map(|gpu| &mut gpu.instances).flat_map(|one| &mut one.compute);
                let compute = all.find(|compute| compute.key == key).ok_or(Refusal::InvalidArgument)?;
                Ok(&mut compute.processes)
            }
        }
    }

    fn indexed(&self) -> impl Iterator<Item = (u32, &Gpu)> {
        (0..).zip(&self.gpus)
    }

    fn any_gpu(&self, index: u32) -> Result<&Gpu, Refusal> {
        usize::try_from(index).ok().and_then(|index| self.gpus.get(index)).ok_or(Refusal::InvalidArgument)
    }

    fn gpu_mut(&mut self, index: u32) -> Result<&mut Gpu, Refusal> {
        usize::try_from(index).ok().and_then(|index| self.gpus.get_mut(index)).ok_or(Refusal::InvalidArgument)
    }

    fn new_key(&mut self) -> u64 {
        let key = self.next_key;
        self.next_key = key.saturating_add(1);
        key
    }

    fn tell_of_mig_change(&mut self, gpu: u32) {
        self.tell(gpu, nvml::nvmlEventMigConfigChange, 0, None);
    }

    fn tell(&mut self, gpu: u32, kind: u32, data: u64, gpu_instance: Option<u32>) {
        let number = self.next_event;
        self.next_event = number.saturating_add(1);
        if self.events.len() == MAX_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(Event { number, gpu, kind: kind.into(), data, gpu_instance, compute_instance: None });
    }
}

/// A random UUID (version 4) in its usual form.
#[must_use]
pub fn uuid() -> String {
    let random: u128 = rand::random();
    let versioned = (random & !(0xf << 76) & !(0b11 << 62)) | (0x4 << 76) | (0b10 << 62);
    let hex = format!("{versioned:032x}");
    let part = |range: std::ops::Range<usize>| hex.get(range).unwrap_or_default().to_owned();
    [part(0..8), part(8..12), part(12..16), part(16..20), part(20..32)].join("-")
}
