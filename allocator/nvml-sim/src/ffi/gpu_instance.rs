//! GPU instances: profiles, placements, create, list, destroy.

use std::ffi::{c_uint, c_ulonglong};
use std::mem::size_of;

use nvml_wrapper_sys::bindings as nvml;

use super::export;
use super::handle::{DeviceHandle, GpuInstanceHandle};
use super::pointer::{Buffer, In, Out, member};
use crate::driver::Driver;
use crate::facts::{Placement, Profile};
use crate::refusal::Refusal;
use crate::state::Device;

export! {
    fn nvmlDeviceGetGpuInstanceProfileInfo(
        device: DeviceHandle,
        profile: c_uint,
        info: Out<nvml::nvmlGpuInstanceProfileInfo_t>,
    ) with driver => {
        let profile = profile_by_index(&driver, device, profile)?;
        info.put(nvml::nvmlGpuInstanceProfileInfo_t {
            id: profile.id,
            isP2pSupported: 0,
            sliceCount: profile.compute_slices,
            instanceCount: profile.max_instances,
            multiprocessorCount: number(profile.multiprocessors),
            copyEngineCount: number(profile.copy_engines),
            decoderCount: profile.media.decoders,
            encoderCount: profile.media.encoders,
            jpegCount: profile.media.jpeg,
            ofaCount: profile.media.ofa,
            memorySizeMB: profile.memory_mib,
        })
    }

    fn nvmlDeviceGetGpuInstanceProfileInfoV(
        device: DeviceHandle,
        profile: c_uint,
        info: Out<nvml::nvmlGpuInstanceProfileInfo_v2_t>,
    ) with driver => {
        info.check()?;
        put_versioned(profile_by_index(&driver, device, profile)?, &info)
    }

    fn nvmlDeviceGetGpuInstanceProfileInfoByIdV(
        device: DeviceHandle,
        id: c_uint,
        info: Out<nvml::nvmlGpuInstanceProfileInfo_v2_t>,
    ) with driver => {
        info.check()?;
        put_versioned(profile_by_id(&driver, device, id)?, &info)
    }

    fn nvmlDeviceGetGpuInstancePossiblePlacements(
        device: DeviceHandle,
        profile: c_uint,
        placements: Buffer<nvml::nvmlGpuInstancePlacement_t>,
        count: Out<c_uint>,
    ) with driver => {
        possible_placements(&driver, device, profile, &placements, &count)
    }

    fn nvmlDeviceGetGpuInstancePossiblePlacements_v2(
        device: DeviceHandle,
        profile: c_uint,
        placements: Buffer<nvml::nvmlGpuInstancePlacement_t>,
        count: Out<c_uint>,
    ) with driver => {
        possible_placements(&driver, device, profile, &placements, &count)
    }

    fn nvmlDeviceGetGpuInstanceRemainingCapacity(
        device: DeviceHandle,
        profile: c_uint,
        count: Out<c_uint>,
    ) with driver => {
        let branch = driver.machine().driver_branch();
        count.put(driver.state()?.remaining_gpu_instances(device.gpu()?, branch, profile)?)
    }

    fn nvmlDeviceCreateGpuInstance(
        device: DeviceHandle,
        profile: c_uint,
        instance: Out<GpuInstanceHandle>,
    ) with driver => {
        create(&driver, device, profile, None, &instance)
    }

    fn nvmlDeviceCreateGpuInstanceWithPlacement(
        device: DeviceHandle,
        profile: c_uint,
        placement: In<nvml::nvmlGpuInstancePlacement_t>,
        instance: Out<GpuInstanceHandle>,
    ) with driver => {
        let nvml::nvmlGpuInstancePlacement_t { start, size } = placement.get()?;
        create(&driver, device, profile, Some(Placement { start, size }), &instance)
    }

    fn nvmlGpuInstanceDestroy(instance: GpuInstanceHandle) with driver => {
        driver.destroy_gpu_instance(instance.key()?)
    }

    fn nvmlDeviceGetGpuInstances(
        device: DeviceHandle,
        profile: c_uint,
        instances: Buffer<GpuInstanceHandle>,
        count: Out<c_uint>,
    ) with driver => {
        instances.check()?;
        count.check()?;
        let (state, index) = (driver.state()?, device.gpu()?);
        state.divisible(index, driver.machine().driver_branch(), profile)?;
        let of_profile = state.gpu(index)?.instances.iter().filter(|instance| instance.profile == profile);
        let handles: Vec<_> = of_profile.map(|instance| GpuInstanceHandle::new(instance.key)).collect();
        // NVML asks for room for as many as the profile allows, and there are no more.
        instances.put_all(&handles)?;
        count.put(c_uint::try_from(handles.len()).map_err(|_| Refusal::Unknown)?)
    }

    fn nvmlDeviceGetGpuInstanceById(
        device: DeviceHandle,
        id: c_uint,
        instance: Out<GpuInstanceHandle>,
    ) with driver => {
        let state = driver.state()?;
        let gpu = state.gpu(device.gpu()?)?;
        if !gpu.mig {
            return Err(Refusal::NotSupported);
        }
        let found = gpu.instances.iter().find(|instance| instance.id == id).ok_or(Refusal::NotFound)?;
        instance.put(GpuInstanceHandle::new(found.key))
    }

    fn nvmlGpuInstanceGetInfo(
        instance: GpuInstanceHandle,
        info: Out<nvml::nvmlGpuInstanceInfo_t>,
    ) with driver => {
        let state = driver.state()?;
        let found = state.gpu_instance(instance.key()?)?;
        let Placement { start, size } = found.instance.placement();
        info.put(nvml::nvmlGpuInstanceInfo_t {
            device: DeviceHandle::new(Device::Gpu(found.gpu_index)).raw(),
            id: found.instance.id,
            profileId: found.instance.profile,
            placement: nvml::nvmlGpuInstancePlacement_t { start, size },
        })
    }
}

/// The number a structure of version `version` begins with.
pub fn version_of<T>(version: u32) -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(0) | version << 24
}

/// A number that not every source tells.
pub fn number(known: Option<u32>) -> c_uint {
    known.unwrap_or(nvml::NVML_VALUE_NOT_AVAILABLE.cast_unsigned())
}

fn profile_by_index(driver: &Driver, device: DeviceHandle, index: u32) -> Result<&'static Profile, Refusal> {
    let rules = driver.state()?.gpu(device.gpu()?)?.rules(driver.machine().driver_branch())?;
    // One more than this library's bindings count: callers go on until the argument is invalid.
    if index > nvml::NVML_GPU_INSTANCE_PROFILE_COUNT {
        return Err(Refusal::InvalidArgument);
    }
    rules.profiles().find(|profile| profile.index == index).ok_or(Refusal::NotSupported)
}

fn profile_by_id(driver: &Driver, device: DeviceHandle, id: u32) -> Result<&'static Profile, Refusal> {
    let rules = driver.state()?.gpu(device.gpu()?)?.rules(driver.machine().driver_branch())?;
    rules.profile(id).ok_or(Refusal::NotSupported)
}

fn put_versioned(profile: &Profile, info: &Out<nvml::nvmlGpuInstanceProfileInfo_v2_t>) -> Result<(), Refusal> {
    let version = info.version()?;
    let name = member(&format!("MIG {}", profile.name));
    if version == version_of::<nvml::nvmlGpuInstanceProfileInfo_v2_t>(2) {
        return info.put(nvml::nvmlGpuInstanceProfileInfo_v2_t {
            version,
            id: profile.id,
            isP2pSupported: 0,
            sliceCount: profile.compute_slices,
            instanceCount: profile.max_instances,
            multiprocessorCount: number(profile.multiprocessors),
            copyEngineCount: number(profile.copy_engines),
            decoderCount: profile.media.decoders,
            encoderCount: profile.media.encoders,
            jpegCount: profile.media.jpeg,
            ofaCount: profile.media.ofa,
            memorySizeMB: profile.memory_mib,
            name,
        });
    }
    if version == version_of::<nvml::nvmlGpuInstanceProfileInfo_v3_t>(3) {
        let graphics = if profile.name.contains("+gfx") { nvml::NVML_GPU_INSTANCE_PROFILE_CAPS_GFX } else { 0 };
        return info.cast().put(nvml::nvmlGpuInstanceProfileInfo_v3_t {
            version,
            id: profile.id,
            sliceCount: profile.compute_slices,
            instanceCount: profile.max_instances,
            multiprocessorCount: number(profile.multiprocessors),
            copyEngineCount: number(profile.copy_engines),
            decoderCount: profile.media.decoders,
            encoderCount: profile.media.encoders,
            jpegCount: profile.media.jpeg,
            ofaCount: profile.media.ofa,
            memorySizeMB: c_ulonglong::from(profile.memory_mib),
            name,
            capabilities: graphics,
        });
    }
    Err(Refusal::ArgumentVersionMismatch)
}

fn possible_placements(
    driver: &Driver,
    device: DeviceHandle,
    profile: u32,
    placements: &Buffer<nvml::nvmlGpuInstancePlacement_t>,
    count: &Out<c_uint>,
) -> Result<(), Refusal> {
    count.check()?;
    let possible = &profile_by_id(driver, device, profile)?.placements;
    let possible: Vec<_> =
        possible.iter().map(|&Placement { start, size }| nvml::nvmlGpuInstancePlacement_t { start, size }).collect();
    if placements.is_null() {
        return count.put(c_uint::try_from(possible.len()).map_err(|_| Refusal::Unknown)?);
    }
    placements.put_counted(count, &possible)
}

fn create(
    driver: &Driver,
    device: DeviceHandle,
    profile: u32,
    placement: Option<Placement>,
    instance: &Out<GpuInstanceHandle>,
) -> Result<(), Refusal> {
    instance.check()?;
    let (index, branch) = (device.gpu()?, driver.machine().driver_branch());
    let key = driver.change(|state| state.create_gpu_instance(index, branch, profile, placement))?;
    instance.put(GpuInstanceHandle::new(key))
}
