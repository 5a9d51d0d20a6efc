//! Compute instances: profiles, placements, create, list, destroy.

use std::ffi::c_uint;

use nvml_wrapper_sys::bindings as nvml;

use super::export;
use super::gpu_instance::{number, version_of};
use super::handle::{ComputeInstanceHandle, DeviceHandle, GpuInstanceHandle};
use super::pointer::{Buffer, In, Out, member};
use crate::driver::Driver;
use crate::facts::{Placement, Profile};
use crate::geometry::{ComputeProfile, compute_profiles};
use crate::refusal::Refusal;
use crate::state::Device;

export! {
    fn nvmlGpuInstanceGetComputeInstanceProfileInfo(
        instance: GpuInstanceHandle,
        profile: c_uint,
        engines: c_uint,
        info: Out<nvml::nvmlComputeInstanceProfileInfo_t>,
    ) with driver => {
        let (parent, profile) = profile_by_index(&driver, instance, profile, engines)?;
        info.put(nvml::nvmlComputeInstanceProfileInfo_t {
            id: profile.id,
            sliceCount: profile.slices,
            instanceCount: profile.max_instances,
            multiprocessorCount: number(profile.multiprocessors(parent)),
            sharedCopyEngineCount: number(parent.copy_engines),
            sharedDecoderCount: parent.media.decoders,
            sharedEncoderCount: parent.media.encoders,
            sharedJpegCount: parent.media.jpeg,
            sharedOfaCount: parent.media.ofa,
        })
    }

    fn nvmlGpuInstanceGetComputeInstanceProfileInfoV(
        instance: GpuInstanceHandle,
        profile: c_uint,
        engines: c_uint,
        info: Out<nvml::nvmlComputeInstanceProfileInfo_v2_t>,
    ) with driver => {
        info.check()?;
        let (parent, profile) = profile_by_index(&driver, instance, profile, engines)?;
        put_versioned(parent, profile, &info)
    }

    fn nvmlGpuInstanceGetComputeInstanceRemainingCapacity(
        instance: GpuInstanceHandle,
        profile: c_uint,
        count: Out<c_uint>,
    ) with driver => {
        let state = driver.state()?;
        let found = state.gpu_instance(instance.key()?)?;
        let free = found.compute_profile(profile)?.free_placements(&found.instance.compute_placements());
        count.put(c_uint::try_from(free.len()).map_err(|_| Refusal::Unknown)?)
    }

    fn nvmlGpuInstanceGetComputeInstancePossiblePlacements(
        instance: GpuInstanceHandle,
        profile: c_uint,
        placements: Buffer<nvml::nvmlComputeInstancePlacement_t>,
        count: Out<c_uint>,
    ) with driver => {
        count.check()?;
        let state = driver.state()?;
        let possible = state.gpu_instance(instance.key()?)?.compute_profile(profile)?.placements();
        let possible: Vec<_> = possible
            .into_iter()
            .map(|Placement { start, size }| nvml::nvmlComputeInstancePlacement_t { start, size })
            .collect();
        if placements.is_null() {
            return count.put(c_uint::try_from(possible.len()).map_err(|_| Refusal::Unknown)?);
        }
        placements.put_counted(&count, &possible)
    }

    fn nvmlGpuInstanceCreateComputeInstance(
        instance: GpuInstanceHandle,
        profile: c_uint,
        compute: Out<ComputeInstanceHandle>,
    ) with driver => {
        create(&driver, instance, profile, None, &compute)
    }

    fn nvmlGpuInstanceCreateComputeInstanceWithPlacement(
        instance: GpuInstanceHandle,
        profile: c_uint,
        placement: In<nvml::nvmlComputeInstancePlacement_t>,
        compute: Out<ComputeInstanceHandle>,
    ) with driver => {
        let nvml::nvmlComputeInstancePlacement_t { start, size } = placement.get()?;
        create(&driver, instance, profile, Some(Placement { start, size }), &compute)
    }

    fn nvmlComputeInstanceDestroy(compute: ComputeInstanceHandle) with driver => {
        driver.destroy_compute_instance(compute.key()?)
    }

    fn nvmlGpuInstanceGetComputeInstances(
        instance: GpuInstanceHandle,
        profile: c_uint,
        instances: Buffer<ComputeInstanceHandle>,
        count: Out<c_uint>,
    ) with driver => {
        instances.check()?;
        count.check()?;
        let state = driver.state()?;
        let found = state.gpu_instance(instance.key()?)?;
        found.compute_profile(profile)?;
        let of_profile = found.instance.compute.iter().filter(|compute| compute.profile == profile);
        let handles: Vec<_> = of_profile.map(|compute| ComputeInstanceHandle::new(compute.key)).collect();
        // NVML asks for room for as many as the profile allows, and there are no more.
        instances.put_all(&handles)?;
        count.put(c_uint::try_from(handles.len()).map_err(|_| Refusal::Unknown)?)
    }

    fn nvmlGpuInstanceGetComputeInstanceById(
        instance: GpuInstanceHandle,
        id: c_uint,
        compute: Out<ComputeInstanceHandle>,
    ) with driver => {
        let state = driver.state()?;
        let all = &state.gpu_instance(instance.key()?)?.instance.compute;
        let found = all.iter().find(|compute| compute.id == id).ok_or(Refusal::NotFound)?;
        compute.put(ComputeInstanceHandle::new(found.key))
    }

    fn nvmlComputeInstanceGetInfo(
        compute: ComputeInstanceHandle,
        info: Out<nvml::nvmlComputeInstanceInfo_t>,
    ) with driver => {
        put_info(&driver, compute, &info)
    }

    fn nvmlComputeInstanceGetInfo_v2(
        compute: ComputeInstanceHandle,
        info: Out<nvml::nvmlComputeInstanceInfo_t>,
    ) with driver => {
        put_info(&driver, compute, &info)
    }
}

fn profile_by_index(
    driver: &Driver,
    instance: GpuInstanceHandle,
    index: u32,
    engines: u32,
) -> Result<(&'static Profile, ComputeProfile), Refusal> {
    let state = driver.state()?;
    let parent = state.gpu_instance(instance.key()?)?.profile()?;
    if index >= nvml::NVML_COMPUTE_INSTANCE_PROFILE_COUNT || engines >= nvml::NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_COUNT
    {
        return Err(Refusal::InvalidArgument);
    }
    let mut profiles = compute_profiles(parent.compute_slices).into_iter();
    Ok((parent, profiles.find(|profile| profile.id == index).ok_or(Refusal::NotSupported)?))
}

fn put_versioned(
    parent: &Profile,
    profile: ComputeProfile,
    info: &Out<nvml::nvmlComputeInstanceProfileInfo_v2_t>,
) -> Result<(), Refusal> {
    let version = info.version()?;
    let name = member(&format!("MIG {}", profile.name(parent)));
    if version == version_of::<nvml::nvmlComputeInstanceProfileInfo_v2_t>(2) {
        return info.put(nvml::nvmlComputeInstanceProfileInfo_v2_t {
            version,
            id: profile.id,
            sliceCount: profile.slices,
            instanceCount: profile.max_instances,
            multiprocessorCount: number(profile.multiprocessors(parent)),
            sharedCopyEngineCount: number(parent.copy_engines),
            sharedDecoderCount: parent.media.decoders,
            sharedEncoderCount: parent.media.encoders,
            sharedJpegCount: parent.media.jpeg,
            sharedOfaCount: parent.media.ofa,
            name,
        });
    }
    if version == version_of::<nvml::nvmlComputeInstanceProfileInfo_v3_t>(3) {
        let graphics = if parent.name.contains("+gfx") { nvml::NVML_COMPUTE_INSTANCE_PROFILE_CAPS_GFX } else { 0 };
        return info.cast().put(nvml::nvmlComputeInstanceProfileInfo_v3_t {
            version,
            id: profile.id,
            sliceCount: profile.slices,
            instanceCount: profile.max_instances,
            multiprocessorCount: number(profile.multiprocessors(parent)),
            sharedCopyEngineCount: number(parent.copy_engines),
            sharedDecoderCount: parent.media.decoders,
            sharedEncoderCount: parent.media.encoders,
            sharedJpegCount: parent.media.jpeg,
            sharedOfaCount: parent.media.ofa,
            name,
            capabilities: graphics,
        });
    }
    Err(Refusal::ArgumentVersionMismatch)
}

fn create(
    driver: &Driver,
    instance: GpuInstanceHandle,
    profile: u32,
    placement: Option<Placement>,
    compute: &Out<ComputeInstanceHandle>,
) -> Result<(), Refusal> {
    compute.check()?;
    let parent = instance.key()?;
    let key = driver.change(|state| state.create_compute_instance(parent, profile, placement))?;
    compute.put(ComputeInstanceHandle::new(key))
}

fn put_info(
    driver: &Driver,
    compute: ComputeInstanceHandle,
    info: &Out<nvml::nvmlComputeInstanceInfo_t>,
) -> Result<(), Refusal> {
    let state = driver.state()?;
    let found = state.compute_instance(compute.key()?)?;
    let Placement { start, size } = found.compute.placement();
    info.put(nvml::nvmlComputeInstanceInfo_t {
        device: DeviceHandle::new(Device::Gpu(found.parent.gpu_index)).raw(),
        gpuInstance: GpuInstanceHandle::new(found.parent.instance.key).raw(),
        id: found.compute.id,
        profileId: found.compute.profile,
        placement: nvml::nvmlComputeInstancePlacement_t { start, size },
    })
}
