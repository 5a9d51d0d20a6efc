//! NVML, made safe: nvml-wrapper for what it has, and here, through nvml-wrapper-sys, what it lacks.
//!
//! The only place of this crate with `unsafe`. Each call says once why it is sound; what the calls mean for
//! slices is in `driver.rs`.
#![allow(unsafe_code)]

use super::DriverError;
use mlad::api::Placement;
use nvml_wrapper::{Nvml, error::NvmlError};
use nvml_wrapper_sys::bindings as sys;
use std::{
    ffi::{CStr, OsStr},
    mem, ptr,
};

/// The library, loaded and initialised, by both crates: NVML counts its users.
pub(super) struct Library {
    nvml: Nvml,
    raw: sys::NvmlLib,
}

/// The handle of a GPU instance. Fetched anew for each operation and never kept, since NVML does not promise what
/// it does with one whose instance is gone.
#[derive(Clone, Copy)]
pub(super) struct GpuInstance(sys::nvmlGpuInstance_t);

/// The handle of a compute instance; fetched anew likewise.
#[derive(Clone, Copy)]
pub(super) struct ComputeInstance(sys::nvmlComputeInstance_t);

/// What NVML tells of a GPU instance profile.
pub(super) struct ProfileInfo {
    pub(super) info: sys::nvmlGpuInstanceProfileInfo_t,
    /// The name, from drivers that tell it.
    pub(super) name: Option<String>,
}

/// The most handles that are asked for at once; no GPU has near as many instances.
const MOST: usize = 64;

/// Calls a function of NVML and hands the code it answers to `$check`.
macro_rules! call {
    ($library:expr, $function:ident ( $($argument:expr),* )) => {
        call!($library, $function($($argument),*), check)
    };
    ($library:expr, $function:ident ( $($argument:expr),* ), $check:ident) => {
        match $library.raw.$function.as_ref() {
            // SAFETY: the library is loaded and initialised for as long as `self` lives, the function has the
            // type NVIDIA's header gives it, and every pointer passed is to a live local of the right type
            // (arrays with their length beside them). Handles come from NVML itself.
            Ok(function) => $check(unsafe { function($($argument),*) }),
            Err(_) => Err(DriverError::Other(concat!(stringify!($function), " is missing: the driver is too old").to_owned())),
        }
    };
}

impl Library {
    /// Loads the library at `path`, or the system's.
    pub(super) fn open(path: Option<&OsStr>) -> Result<Self, DriverError> {
        let path = path.unwrap_or(OsStr::new("libnvidia-ml.so.1"));
        let absent = |error: NvmlError| DriverError::Absent(format!("{}: {error}", path.display()));
        let nvml = Nvml::builder().lib_path(path).init().map_err(absent)?;
        // SAFETY: loading runs the library's initialisers; it is the driver's own, which nvml-wrapper has
        // just loaded too, by the same name.
        let raw = unsafe { sys::NvmlLib::new(path) }.map_err(|error| DriverError::Absent(error.to_string()))?;
        let library = Self { nvml, raw };
        call!(library, nvmlInit_v2())?;
        Ok(library)
    }

    /// nvml-wrapper's half.
    pub(super) fn nvml(&self) -> &Nvml {
        &self.nvml
    }

    /// The profile of this kind (`NVML_GPU_INSTANCE_PROFILE_*`); none if the GPU has none of that kind.
    pub(super) fn profile_info(
        &self,
        device: &nvml_wrapper::Device<'_>,
        kind: u32,
    ) -> Result<Option<ProfileInfo>, DriverError> {
        let mut info = zeroed::<sys::nvmlGpuInstanceProfileInfo_t>();
        if !call!(self, nvmlDeviceGetGpuInstanceProfileInfo(handle(device), kind, &mut info), exists)? {
            return Ok(None);
        }
        Ok(Some(ProfileInfo { info, name: self.profile_name(device, kind)? }))
    }

    /// The name of a profile; none from drivers that do not tell it.
    fn profile_name(&self, device: &nvml_wrapper::Device<'_>, kind: u32) -> Result<Option<String>, DriverError> {
        if self.raw.nvmlDeviceGetGpuInstanceProfileInfoV.is_err() {
            return Ok(None);
        }
        let mut named = zeroed::<sys::nvmlGpuInstanceProfileInfo_v2_t>();
        named.version = mem::size_of::<sys::nvmlGpuInstanceProfileInfo_v2_t>() as u32 | 2 << 24;
        if !call!(self, nvmlDeviceGetGpuInstanceProfileInfoV(handle(device), kind, &mut named), is_known)? {
            return Ok(None);
        }
        let bytes = named.name.map(|c| c as u8);
        let name = CStr::from_bytes_until_nul(&bytes).ok().and_then(|name| name.to_str().ok());
        Ok(name.filter(|name| !name.is_empty()).map(str::to_owned))
    }

    /// Where instances of a profile may lie, whatever lies there now.
    pub(super) fn placements(
        &self,
        device: &nvml_wrapper::Device<'_>,
        profile: u32,
    ) -> Result<Vec<Placement>, DriverError> {
        let mut count = 0;
        let none = ptr::null_mut();
        call!(self, nvmlDeviceGetGpuInstancePossiblePlacements_v2(handle(device), profile, none, &mut count))?;
        let mut placements = vec![zeroed::<sys::nvmlGpuInstancePlacement_t>(); (count as usize).min(MOST)];
        let mut count = placements.len() as u32;
        let array = placements.as_mut_ptr();
        call!(self, nvmlDeviceGetGpuInstancePossiblePlacements_v2(handle(device), profile, array, &mut count))?;
        placements.truncate(count as usize);
        Ok(placements.into_iter().map(|at| Placement { start: at.start, size: at.size }).collect())
    }

    /// The GPU instances of a profile, which has at most `most`.
    pub(super) fn gpu_instances(
        &self,
        device: &nvml_wrapper::Device<'_>,
        profile: u32,
    ) -> Result<Vec<GpuInstance>, DriverError> {
        let mut handles = [ptr::null_mut(); MOST];
        let mut count = MOST as u32;
        call!(self, nvmlDeviceGetGpuInstances(handle(device), profile, handles.as_mut_ptr(), &mut count))?;
        Ok(handles.into_iter().take(count as usize).map(GpuInstance).collect())
    }

    /// The GPU instance with this number.
    pub(super) fn gpu_instance(&self, device: &nvml_wrapper::Device<'_>, id: u32) -> Result<GpuInstance, DriverError> {
        let mut instance = ptr::null_mut();
        call!(self, nvmlDeviceGetGpuInstanceById(handle(device), id, &mut instance))?;
        Ok(GpuInstance(instance))
    }

    /// Number, profile and place of a GPU instance.
    pub(super) fn gpu_instance_info(&self, instance: GpuInstance) -> Result<sys::nvmlGpuInstanceInfo_t, DriverError> {
        let mut info = zeroed::<sys::nvmlGpuInstanceInfo_t>();
        call!(self, nvmlGpuInstanceGetInfo(instance.0, &mut info))?;
        Ok(info)
    }

    /// Makes a GPU instance at a place.
    pub(super) fn create_gpu_instance(
        &self,
        device: &nvml_wrapper::Device<'_>,
        profile: u32,
        placement: Placement,
    ) -> Result<GpuInstance, DriverError> {
        let mut instance = ptr::null_mut();
        let at = sys::nvmlGpuInstancePlacement_t { start: placement.start, size: placement.size };
        call!(self, nvmlDeviceCreateGpuInstanceWithPlacement(handle(device), profile, &at, &mut instance))?;
        Ok(GpuInstance(instance))
    }

    /// Destroys a GPU instance that has no compute instance.
    pub(super) fn destroy_gpu_instance(&self, instance: GpuInstance) -> Result<(), DriverError> {
        call!(self, nvmlGpuInstanceDestroy(instance.0))
    }

    /// Number and compute slices of a compute instance profile; none if the instance has none of that kind.
    pub(super) fn compute_profile(&self, instance: GpuInstance, kind: u32) -> Result<Option<(u32, u32)>, DriverError> {
        let mut info = zeroed::<sys::nvmlComputeInstanceProfileInfo_t>();
        let engines = sys::NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED;
        let there =
            call!(self, nvmlGpuInstanceGetComputeInstanceProfileInfo(instance.0, kind, engines, &mut info), exists)?;
        Ok(there.then_some((info.id, info.sliceCount)))
    }

    /// The compute instances of a profile in a GPU instance.
    pub(super) fn compute_instances(
        &self,
        instance: GpuInstance,
        profile: u32,
    ) -> Result<Vec<ComputeInstance>, DriverError> {
        let mut handles = [ptr::null_mut(); MOST];
        let mut count = MOST as u32;
        call!(self, nvmlGpuInstanceGetComputeInstances(instance.0, profile, handles.as_mut_ptr(), &mut count))?;
        Ok(handles.into_iter().take(count as usize).map(ComputeInstance).collect())
    }

    /// Makes a compute instance.
    pub(super) fn create_compute_instance(&self, instance: GpuInstance, profile: u32) -> Result<(), DriverError> {
        let mut made = ptr::null_mut();
        call!(self, nvmlGpuInstanceCreateComputeInstance(instance.0, profile, &mut made))
    }

    /// Destroys a compute instance.
    pub(super) fn destroy_compute_instance(&self, instance: ComputeInstance) -> Result<(), DriverError> {
        call!(self, nvmlComputeInstanceDestroy(instance.0))
    }

    /// Numbers of the GPU instance and the compute instance that a MIG device is.
    pub(super) fn mig_device_ids(&self, device: &nvml_wrapper::Device<'_>) -> Result<(u32, u32), DriverError> {
        let (mut gpu, mut compute) = (0, 0);
        call!(self, nvmlDeviceGetGpuInstanceId(handle(device), &mut gpu))?;
        call!(self, nvmlDeviceGetComputeInstanceId(handle(device), &mut compute))?;
        Ok((gpu, compute))
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // The end of our half; nvml-wrapper ends its own.
        if let Err(error) = call!(self, nvmlShutdown()) {
            tracing::debug!(%error, "NVML did not shut down");
        }
    }
}

fn handle(device: &nvml_wrapper::Device<'_>) -> sys::nvmlDevice_t {
    // SAFETY: the handle is used for one call, while `device` and with it the library live.
    unsafe { device.handle() }
}

/// Whether two are the same device. Asks nothing of it, and so is answered for one that is lost, too.
pub(super) fn is_same(one: &nvml_wrapper::Device<'_>, other: &nvml_wrapper::Device<'_>) -> bool {
    handle(one) == handle(other)
}

/// A C struct of numbers, arrays and pointers, all zero.
fn zeroed<T: Copy>() -> T {
    // SAFETY: only used for NVML's plain structs, in which zero is a value of every field.
    unsafe { mem::zeroed() }
}

fn check(code: sys::nvmlReturn_t) -> Result<(), DriverError> {
    match code {
        sys::nvmlReturn_enum_NVML_SUCCESS => Ok(()),
        sys::nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_RESOURCES => Err(DriverError::NoRoom),
        other => Err(DriverError::from(NvmlError::from(other))),
    }
}

/// Whether what was asked for by its number is there. These answers alone mean that it is not: any other would
/// let a GPU look as if it could be cut into less than it can.
fn exists(code: sys::nvmlReturn_t) -> Result<bool, DriverError> {
    match code {
        sys::nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED | sys::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT => Ok(false),
        other => check(other).map(|()| true),
    }
}

/// Whether the driver knows a call of this version, and what was asked for by it is there.
fn is_known(code: sys::nvmlReturn_t) -> Result<bool, DriverError> {
    match code {
        sys::nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH
        | sys::nvmlReturn_enum_NVML_ERROR_FUNCTION_NOT_FOUND => Ok(false),
        other => exists(other),
    }
}

impl From<NvmlError> for DriverError {
    fn from(error: NvmlError) -> Self {
        match error {
            NvmlError::Uninitialized | NvmlError::DriverNotLoaded | NvmlError::LibRmVersionMismatch => {
                Self::Absent(error.to_string())
            }
            NvmlError::GpuLost | NvmlError::ResetRequired => Self::Lost(error.to_string()),
            NvmlError::InUse => Self::InUse,
            NvmlError::NoPermission => Self::Denied,
            NvmlError::NotFound => Self::NotFound,
            other => Self::Other(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::puppet::SimFolder;

    #[test]
    fn an_error_is_not_taken_for_there_is_none() {
        let machine = SimFolder::new("[[gpu]]\nmodel = \"A100-40GB\"\nmig = true\n");
        let library = Library::open(Some(machine.library().as_os_str())).unwrap();
        let device = library.nvml().device_by_index(0).unwrap();
        let instance = library.create_gpu_instance(&device, 19, Placement { start: 0, size: 1 }).unwrap();
        assert!(library.profile_info(&device, 0).unwrap().is_some_and(|profile| profile.name.is_some()));
        // Eight compute slices: no such profile on an A100. And a number that is none at all.
        for kind in [sys::NVML_GPU_INSTANCE_PROFILE_8_SLICE, 99] {
            assert!(library.profile_info(&device, kind).unwrap().is_none());
        }
        assert_eq!(library.compute_profile(instance, 0).unwrap(), Some((0, 1)));
        assert_eq!(library.compute_profile(instance, 99).unwrap(), None);
        machine.break_driver();
        assert!(matches!(library.profile_info(&device, 0), Err(DriverError::Other(_))));
        assert!(matches!(library.compute_profile(instance, 0), Err(DriverError::Other(_))));
    }

    #[test]
    fn only_two_answers_mean_that_there_is_none() {
        let all = 0..=sys::nvmlReturn_enum_NVML_ERROR_RESET_TYPE_NOT_SUPPORTED;
        for code in all.chain([sys::nvmlReturn_enum_NVML_ERROR_UNKNOWN]) {
            let expected = match code {
                sys::nvmlReturn_enum_NVML_SUCCESS => Some(true),
                sys::nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED | sys::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT => {
                    Some(false)
                }
                _ => None,
            };
            assert_eq!(exists(code).ok(), expected, "{code}");
        }
        assert_eq!(exists(sys::nvmlReturn_enum_NVML_ERROR_NO_PERMISSION), Err(DriverError::Denied));
    }
}
