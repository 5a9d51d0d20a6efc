//! What NVML's calls mean for slices.

use super::nvml::{ComputeInstance, GpuInstance, Library, is_same};
use super::xid::DOUBLE_BIT;
use super::{Device, Driver, DriverError, Event, Instance, Listed, Reading};
use crate::geometry::{Model, Profile, ProfileName, Resources};
use mlad::api::Placement;
use nvml_wrapper::{bitmasks::event::EventTypes, error::NvmlError};
use std::{
    collections::HashMap,
    ffi::OsStr,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// NVIDIA's driver, through NVML.
pub struct NvmlDriver {
    library: Library,
    /// Models by GPU and MIG mode: they cost some forty calls and do not change.
    models: Mutex<HashMap<(String, bool), Model>>,
}

/// Kinds of profile that NVML numbers; it answers "not supported" for those a GPU or a driver does not know.
const KINDS: u32 = 24;
/// A wait for events lasts at most this long, so that a stop is noticed.
const WAIT: Duration = Duration::from_millis(500);

impl NvmlDriver {
    /// Loads NVML from `path`, or the system's.
    ///
    /// # Errors
    /// [`DriverError::Absent`] when there is none, or it does not run.
    pub fn open(path: Option<&Path>) -> Result<Self, DriverError> {
        let library = Library::open(path.map(Path::as_os_str).map(OsStr::new))?;
        Ok(Self { library, models: Mutex::default() })
    }

    fn device(&self, gpu: &str) -> Result<nvml_wrapper::Device<'_>, DriverError> {
        Ok(self.library.nvml().device_by_uuid(gpu)?)
    }

    fn model(&self, gpu: &str, device: &nvml_wrapper::Device<'_>, mig: bool) -> Result<Model, DriverError> {
        let key = (gpu.to_owned(), mig);
        if let Some(model) = self.models.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(model.clone());
        }
        let name = device.name()?;
        let memory_mib = device.memory_info()?.total >> 20;
        let model = match mig {
            true => Model::sliced(name, memory_mib, self.profiles(device, memory_mib)?),
            false => Model::whole(name, memory_mib),
        };
        self.models.lock().unwrap_or_else(PoisonError::into_inner).insert(key, model.clone());
        Ok(model)
    }

    fn profiles(&self, device: &nvml_wrapper::Device<'_>, gpu_memory_mib: u64) -> Result<Vec<Profile>, DriverError> {
        let mut profiles = Vec::new();
        for kind in 0..KINDS {
            let Some(told) = self.library.profile_info(device, kind)? else { continue };
            let info = told.info;
            let placements = self.library.placements(device, info.id)?;
            let Some(columns) = placements.first().map(|placement| placement.size) else { continue };
            let derived = || ProfileName::derive(info.sliceCount, info.memorySizeMB, gpu_memory_mib, variant(kind));
            let name = told.name.map(|name| name.trim_start_matches("MIG ").to_owned());
            let resources = Resources {
                compute: info.sliceCount,
                decoders: info.decoderCount,
                encoders: info.encoderCount,
                jpeg: info.jpegCount,
                ofa: info.ofaCount,
            };
            let starts = placements.iter().filter(|at| at.size == columns).map(|at| at.start);
            let name = name.unwrap_or_else(derived);
            let profile =
                Profile::new(info.id, name, columns, info.memorySizeMB, info.instanceCount, resources, starts);
            match profile {
                Some(profile) => profiles.push(profile),
                None => tracing::warn!(profile = info.id, "a profile leaves the longest axis there is room for"),
            }
        }
        Ok(profiles)
    }

    fn instances(&self, device: &nvml_wrapper::Device<'_>, model: &Model) -> Result<Vec<Instance>, DriverError> {
        let devices = self.mig_devices(device)?;
        let mut instances = Vec::new();
        for profile in model.profiles() {
            for handle in self.library.gpu_instances(device, profile.id)? {
                let info = self.library.gpu_instance_info(handle)?;
                let compute = self.compute_instances(handle)?;
                let own: Vec<_> = devices.iter().filter(|device| device.instance == info.id).collect();
                let whole = compute.first().is_some_and(|(_, slices)| *slices == profile.resources.compute);
                let device = match (compute.as_slice(), own.as_slice()) {
                    ([], _) => Device::Missing,
                    ([_], [device]) if whole => Device::Whole(device.uuid.clone()),
                    _ => Device::Split,
                };
                let processes = own.iter().map(|device| device.processes).sum();
                let placement = Placement { start: info.placement.start, size: info.placement.size };
                instances.push(Instance { id: info.id, profile: info.profileId, placement, device, processes });
            }
        }
        // Profiles of one GPU can share a number at the driver's list call; each instance counts once.
        instances.sort_by_key(|instance| instance.id);
        instances.dedup_by_key(|instance| instance.id);
        Ok(instances)
    }

    fn mig_devices(&self, device: &nvml_wrapper::Device<'_>) -> Result<Vec<MigDevice>, DriverError> {
        let mut devices = Vec::new();
        for index in 0..device.mig_device_count()? {
            let mig = match device.mig_device_by_index(index) {
                Ok(mig) => mig,
                Err(NvmlError::NotFound | NvmlError::InvalidArg) => continue,
                Err(error) => return Err(error.into()),
            };
            let (instance, _) = self.library.mig_device_ids(&mig)?;
            devices.push(MigDevice { instance, uuid: mig.uuid()?, processes: processes(&mig)? });
        }
        Ok(devices)
    }

    /// The compute instances of a GPU instance, with their compute slices.
    fn compute_instances(&self, instance: GpuInstance) -> Result<Vec<(ComputeInstance, u32)>, DriverError> {
        let mut found = Vec::new();
        for (profile, slices) in self.compute_profiles(instance)? {
            let instances = self.library.compute_instances(instance, profile)?;
            found.extend(instances.into_iter().map(|instance| (instance, slices)));
        }
        Ok(found)
    }

    fn compute_profiles(&self, instance: GpuInstance) -> Result<Vec<(u32, u32)>, DriverError> {
        let kinds = (0..KINDS).map(|kind| self.library.compute_profile(instance, kind));
        let mut profiles: Vec<_> = kinds.filter_map(Result::transpose).collect::<Result<_, _>>()?;
        profiles.sort_unstable();
        profiles.dedup_by_key(|(id, _)| *id);
        Ok(profiles)
    }

    fn fill(&self, instance: GpuInstance) -> Result<(), DriverError> {
        let widest = self.compute_profiles(instance)?.into_iter().max_by_key(|(id, slices)| (*slices, u32::MAX - id));
        let (profile, _) = widest.ok_or_else(|| DriverError::Other("it offers no compute instance".to_owned()))?;
        self.library.create_compute_instance(instance, profile)
    }
}

impl Driver for NvmlDriver {
    fn list(&self) -> Result<Vec<Listed>, DriverError> {
        let nvml = self.library.nvml();
        let uuid = |index| Ok(nvml.device_by_index(index)?.uuid()?);
        Ok((0..nvml.device_count()?).map(|index| Listed { index, uuid: uuid(index) }).collect())
    }

    fn read(&self, gpu: &str) -> Result<Reading, DriverError> {
        let device = self.device(gpu)?;
        let index = device.index()?;
        let mig = match device.mig_mode() {
            Ok(mode) => mode.current == nvml_wrapper_sys::bindings::NVML_DEVICE_MIG_ENABLE,
            Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => false,
            Err(error) => return Err(error.into()),
        };
        let model = self.model(gpu, &device, mig)?;
        let instances = match mig {
            true => self.instances(&device, &model)?,
            false => vec![Instance {
                id: 0,
                profile: 0,
                placement: Placement { start: 0, size: 1 },
                device: Device::Whole(gpu.to_owned()),
                processes: processes(&device)?,
            }],
        };
        Ok(Reading { index, uuid: gpu.to_owned(), model, instances })
    }

    fn users(&self, gpu: &str) -> Result<Vec<u32>, DriverError> {
        let device = self.device(gpu)?;
        let mut users = pids(&device)?;
        // A GPU in MIG mode need not tell the processes of what is on it.
        for index in 0..mig_devices(&device)? {
            match device.mig_device_by_index(index) {
                Ok(mig) => users.extend(pids(&mig)?),
                Err(NvmlError::NotFound | NvmlError::InvalidArg) => {}
                Err(error) => return Err(error.into()),
            }
        }
        users.sort_unstable();
        users.dedup();
        Ok(users)
    }

    fn create(&self, gpu: &str, profile: u32, placement: Placement) -> Result<(), DriverError> {
        let device = self.device(gpu)?;
        let instance = self.library.create_gpu_instance(&device, profile, placement)?;
        self.fill(instance).inspect_err(|_| {
            if let Err(error) = self.library.destroy_gpu_instance(instance) {
                tracing::warn!(gpu, ?placement, %error, "a GPU instance without compute instance is left");
            }
        })
    }

    fn complete(&self, gpu: &str, instance: u32) -> Result<(), DriverError> {
        let device = self.device(gpu)?;
        self.fill(self.library.gpu_instance(&device, instance)?)
    }

    fn destroy(&self, gpu: &str, instance: u32) -> Result<(), DriverError> {
        let device = self.device(gpu)?;
        let instance = self.library.gpu_instance(&device, instance)?;
        for (compute, _) in self.compute_instances(instance)? {
            self.library.destroy_compute_instance(compute)?;
        }
        self.library.destroy_gpu_instance(instance)
    }

    fn watch(
        &self,
        deadline: Instant,
        stopped: &dyn Fn() -> bool,
        event: &mut dyn FnMut(Event),
    ) -> Result<(), DriverError> {
        let nvml = self.library.nvml();
        let mut set = nvml.create_event_set()?;
        let mut watched = Vec::new();
        for index in 0..nvml.device_count()? {
            // One that does not answer tells no events either; that it is lost is found by listing and reading.
            let Ok(device) = nvml.device_by_index(index) else { continue };
            let wanted =
                EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR | EventTypes::MIG_CONFIG_CHANGE;
            let (Ok(uuid), Ok(known)) = (device.uuid(), device.supported_event_types()) else { continue };
            if !known.intersects(wanted) {
                continue;
            }
            set = device.register_events(known & wanted, set).map_err(|error| DriverError::from(error.error))?;
            watched.push((device, uuid));
        }
        if watched.is_empty() {
            return Err(DriverError::Other("no GPU tells events".to_owned()));
        }
        event(Event::Watching);
        while !stopped() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            match set.wait(left.min(WAIT).as_millis() as u32) {
                Ok(data) => {
                    let xid = data.event_type.contains(EventTypes::CRITICAL_XID_ERROR);
                    // Not asked of the GPU: one that has fallen off the bus does not tell its UUID any more.
                    let Some((_, gpu)) = watched.iter().find(|(device, _)| is_same(device, &data.device)) else {
                        tracing::error!(xid, ?data, "an event of a GPU that is not watched");
                        continue;
                    };
                    let gpu = gpu.clone();
                    event(match (xid, data.event_data) {
                        (true, Some(nvml_wrapper::enums::event::XidError::Value(xid))) => {
                            Event::Xid { gpu, xid: Some(xid) }
                        }
                        (true, _) => Event::Xid { gpu, xid: None },
                        (false, _) if data.event_type.contains(EventTypes::DOUBLE_BIT_ECC_ERROR) => {
                            Event::Xid { gpu, xid: Some(DOUBLE_BIT) }
                        }
                        (false, _) => Event::Changed(gpu),
                    });
                }
                Err(NvmlError::Timeout) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

struct MigDevice {
    instance: u32,
    uuid: String,
    processes: u32,
}

/// Processes that compute on a device; none where the driver does not tell.
fn processes(device: &nvml_wrapper::Device<'_>) -> Result<u32, DriverError> {
    match device.running_compute_processes_count() {
        Err(NvmlError::NotSupported | NvmlError::InvalidArg | NvmlError::FailedToLoadSymbol(_)) => Ok(0),
        count => Ok(count?),
    }
}

/// The processes that compute or draw on a device; none where the driver does not tell.
fn pids(device: &nvml_wrapper::Device<'_>) -> Result<Vec<u32>, DriverError> {
    let mut found = Vec::new();
    for told in [device.running_compute_processes(), device.running_graphics_processes()] {
        match told {
            Err(NvmlError::NotSupported | NvmlError::InvalidArg | NvmlError::FailedToLoadSymbol(_)) => {}
            told => found.extend(told?.into_iter().map(|process| process.pid)),
        }
    }
    Ok(found)
}

/// How many MIG devices there may be at most.
fn mig_devices(device: &nvml_wrapper::Device<'_>) -> Result<u32, DriverError> {
    match device.mig_device_count() {
        Err(NvmlError::NotSupported | NvmlError::InvalidArg | NvmlError::FailedToLoadSymbol(_)) => Ok(0),
        count => Ok(count?),
    }
}

/// The variant that NVML's number of a kind of profile means, for drivers that do not tell names.
fn variant(kind: u32) -> &'static str {
    match kind {
        7 | 8 => "+me",
        10..=12 | 17 => "+gfx",
        13 | 14 => "-me",
        15 | 16 => "+me.all",
        _ => "",
    }
}
