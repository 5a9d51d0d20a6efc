//! MIG mode and MIG devices.

use std::ffi::c_uint;

use nvml_wrapper_sys::bindings as nvml;

use super::export;
use super::gpu_instance::number;
use super::handle::DeviceHandle;
use super::pointer::Out;
use crate::driver::Driver;
use crate::refusal::Refusal;
use crate::state::Device;

export! {
    fn nvmlDeviceSetMigMode(device: DeviceHandle, mode: c_uint, status: Out<nvml::nvmlReturn_t>) with driver => {
        status.check()?;
        let index = device.gpu()?;
        let on = match mode {
            nvml::NVML_DEVICE_MIG_DISABLE => false,
            nvml::NVML_DEVICE_MIG_ENABLE => true,
            _ => return Err(Refusal::InvalidArgument),
        };
        let activation = driver.change(|state| state.set_mig_mode(index, on))?;
        status.put(activation.map_or_else(Refusal::code, |()| nvml::nvmlReturn_enum_NVML_SUCCESS))
    }

    fn nvmlDeviceGetMigMode(device: DeviceHandle, current: Out<c_uint>, pending: Out<c_uint>) with driver => {
        current.check()?;
        pending.check()?;
        let state = driver.state()?;
        let gpu = state.gpu(device.gpu()?)?;
        if gpu.model()?.profiles.is_empty() {
            return Err(Refusal::NotSupported);
        }
        current.put(gpu.mig.into())?;
        pending.put(gpu.mig_pending.into())
    }

    fn nvmlDeviceIsMigDeviceHandle(device: DeviceHandle, is_mig_device: Out<c_uint>) with _ => {
        is_mig_device.put(matches!(device.device()?, Device::Mig(_)).into())
    }

    fn nvmlDeviceGetMaxMigDeviceCount(device: DeviceHandle, count: Out<c_uint>) with driver => {
        let state = driver.state()?;
        let gpu = state.gpu(device.gpu()?)?;
        count.put(if gpu.mig { gpu.model()?.max_instances } else { 0 })
    }

    fn nvmlDeviceGetMigDeviceHandleByIndex(
        device: DeviceHandle,
        index: c_uint,
        mig_device: Out<DeviceHandle>,
    ) with driver => {
        mig_device.check()?;
        let state = driver.state()?;
        let gpu = state.gpu(device.gpu()?)?;
        if !gpu.mig {
            return Err(Refusal::NotSupported);
        }
        let index = usize::try_from(index).map_err(|_| Refusal::InvalidArgument)?;
        let (_, compute) = gpu.mig_devices().nth(index).ok_or(Refusal::NotFound)?;
        mig_device.put(DeviceHandle::new(Device::Mig(compute.key)))
    }

    fn nvmlDeviceGetDeviceHandleFromMigDeviceHandle(
        mig_device: DeviceHandle,
        device: Out<DeviceHandle>,
    ) with driver => {
        let state = driver.state()?;
        let parent = state.compute_instance(mig_device.mig_device()?)?.parent;
        device.put(DeviceHandle::new(Device::Gpu(parent.gpu_index)))
    }

    fn nvmlDeviceGetGpuInstanceId(device: DeviceHandle, id: Out<c_uint>) with driver => {
        id.put(driver.state()?.compute_instance(device.mig_device()?)?.parent.instance.id)
    }

    fn nvmlDeviceGetComputeInstanceId(device: DeviceHandle, id: Out<c_uint>) with driver => {
        id.put(driver.state()?.compute_instance(device.mig_device()?)?.compute.id)
    }

    fn nvmlDeviceGetAttributes(device: DeviceHandle, attributes: Out<nvml::nvmlDeviceAttributes_t>) with driver => {
        put_attributes(&driver, device, &attributes)
    }

    fn nvmlDeviceGetAttributes_v2(device: DeviceHandle, attributes: Out<nvml::nvmlDeviceAttributes_t>) with driver => {
        put_attributes(&driver, device, &attributes)
    }
}

fn put_attributes(
    driver: &Driver,
    device: DeviceHandle,
    attributes: &Out<nvml::nvmlDeviceAttributes_t>,
) -> Result<(), Refusal> {
    let state = driver.state()?;
    let found = state.compute_instance(device.mig_device()?)?;
    let profile = found.parent.profile()?;
    let compute = found.parent.compute_profile(found.compute.profile)?;
    attributes.put(nvml::nvmlDeviceAttributes_t {
        multiprocessorCount: number(compute.multiprocessors(profile)),
        sharedCopyEngineCount: number(profile.copy_engines),
        sharedDecoderCount: profile.media.decoders,
        sharedEncoderCount: profile.media.encoders,
        sharedJpegCount: profile.media.jpeg,
        sharedOfaCount: profile.media.ofa,
        gpuInstanceSliceCount: profile.compute_slices,
        computeInstanceSliceCount: compute.slices,
        memorySizeMB: profile.memory_mib,
    })
}
