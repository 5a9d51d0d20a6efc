//! GPUs and MIG devices as devices: which there are, what they are, how they fare, what runs on them.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong};

use nvml_wrapper_sys::bindings as nvml;

use super::export;
use super::gpu_instance::version_of;
use super::handle::DeviceHandle;
use super::pointer::{Buffer, In, Out, member};
use crate::driver::Driver;
use crate::facts::Generation;
use crate::machine::GpuDescription;
use crate::refusal::Refusal;
use crate::state::{Device, Process, State};

/// How NVML says that a process is in no instance.
const NO_INSTANCE: c_uint = c_uint::MAX;
const MIB: u64 = 1 << 20;

// Which there are.
export! {
    fn nvmlDeviceGetCount(count: Out<c_uint>) with driver => {
        count.put(gpu_count(&*driver.state()?)?)
    }

    fn nvmlDeviceGetCount_v2(count: Out<c_uint>) with driver => {
        count.put(gpu_count(&*driver.state()?)?)
    }

    fn nvmlDeviceGetHandleByIndex(index: c_uint, device: Out<DeviceHandle>) with driver => {
        by_index(&driver, index, &device)
    }

    fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: Out<DeviceHandle>) with driver => {
        by_index(&driver, index, &device)
    }

    fn nvmlDeviceGetHandleByUUID(uuid: In<c_char>, device: Out<DeviceHandle>) with driver => {
        device.put(DeviceHandle::new(driver.state()?.device_by_uuid(&uuid.text()?)?))
    }

    fn nvmlDeviceGetHandleByPciBusId(bus_id: In<c_char>, device: Out<DeviceHandle>) with driver => {
        by_bus_id(&driver, &bus_id, &device)
    }

    fn nvmlDeviceGetHandleByPciBusId_v2(bus_id: In<c_char>, device: Out<DeviceHandle>) with driver => {
        by_bus_id(&driver, &bus_id, &device)
    }

    fn nvmlDeviceGetHandleBySerial(_serial: In<c_char>, _device: Out<DeviceHandle>) with _ => {
        Err(Refusal::NotFound)
    }

    fn nvmlUnitGetCount(count: Out<c_uint>) with _ => {
        count.put(0)
    }
}

// What they are.
export! {
    fn nvmlDeviceGetName(device: DeviceHandle, name: Buffer<c_char>, length: c_uint) with driver => {
        name.put_text(length, &device_name(&driver, device)?)
    }

    fn nvmlDeviceGetUUID(device: DeviceHandle, uuid: Buffer<c_char>, length: c_uint) with driver => {
        let state = driver.state()?;
        match device.device()? {
            Device::Gpu(index) => uuid.put_text(length, &state.gpu(index)?.uuid),
            Device::Mig(key) => uuid.put_text(length, &state.compute_instance(key)?.compute.uuid),
        }
    }

    fn nvmlDeviceGetIndex(device: DeviceHandle, index: Out<c_uint>) with driver => {
        let state = driver.state()?;
        match device.device()? {
            Device::Gpu(its) => state.gpu(its).and_then(|_| index.put(its)),
            Device::Mig(key) => {
                let gpu = state.compute_instance(key)?.parent.gpu;
                let at = gpu.mig_devices().position(|(_, compute)| compute.key == key).ok_or(Refusal::NotFound)?;
                index.put(c_uint::try_from(at).map_err(|_| Refusal::Unknown)?)
            }
        }
    }

    fn nvmlDeviceGetMinorNumber(device: DeviceHandle, minor: Out<c_uint>) with driver => {
        let index = device.gpu()?;
        driver.state()?.gpu(index)?;
        minor.put(index)
    }

    fn nvmlDeviceGetSerial(device: DeviceHandle, _serial: Buffer<c_char>, _length: c_uint) with driver => {
        not_told(&driver, device)
    }

    fn nvmlDeviceGetBrand(device: DeviceHandle, brand: Out<nvml::nvmlBrandType_t>) with driver => {
        let workstation = driver.state()?.gpu(device.gpu()?)?.model()?.workstation;
        brand.put(if workstation {
            nvml::nvmlBrandType_enum_NVML_BRAND_NVIDIA_RTX
        } else {
            nvml::nvmlBrandType_enum_NVML_BRAND_NVIDIA
        })
    }

    fn nvmlDeviceGetArchitecture(
        device: DeviceHandle,
        architecture: Out<nvml::nvmlDeviceArchitecture_t>,
    ) with driver => {
        architecture.put(match driver.state()?.gpu(parent_index(&driver, device)?)?.model()?.generation {
            Generation::Ampere => nvml::NVML_DEVICE_ARCH_AMPERE,
            Generation::Hopper => nvml::NVML_DEVICE_ARCH_HOPPER,
            Generation::Blackwell => nvml::NVML_DEVICE_ARCH_BLACKWELL,
        })
    }

    fn nvmlDeviceGetCudaComputeCapability(device: DeviceHandle, major: Out<c_int>, minor: Out<c_int>) with driver => {
        minor.check()?;
        let capability = driver.state()?.gpu(parent_index(&driver, device)?)?.model()?.compute_capability;
        major.put(capability.0)?;
        minor.put(capability.1)
    }

    fn nvmlDeviceGetPciInfo(device: DeviceHandle, pci: Out<nvml::nvmlPciInfo_t>) with driver => {
        put_pci_info(&driver, device, &pci)
    }

    fn nvmlDeviceGetPciInfo_v2(device: DeviceHandle, pci: Out<nvml::nvmlPciInfo_t>) with driver => {
        put_pci_info(&driver, device, &pci)
    }

    fn nvmlDeviceGetPciInfo_v3(device: DeviceHandle, pci: Out<nvml::nvmlPciInfo_t>) with driver => {
        put_pci_info(&driver, device, &pci)
    }
}

// How they fare.
export! {
    fn nvmlDeviceGetMemoryInfo(device: DeviceHandle, info: Out<nvml::nvmlMemory_t>) with driver => {
        let memory = memory(&driver, device)?;
        let used = memory.used.saturating_add(memory.reserved);
        info.put(nvml::nvmlMemory_t { total: memory.total, free: memory.total.saturating_sub(used), used })
    }

    fn nvmlDeviceGetMemoryInfo_v2(device: DeviceHandle, info: Out<nvml::nvmlMemory_v2_t>) with driver => {
        let version = info.version()?;
        if version != version_of::<nvml::nvmlMemory_v2_t>(2) {
            return Err(Refusal::ArgumentVersionMismatch);
        }
        let Memory { total, reserved, used } = memory(&driver, device)?;
        let free = total.saturating_sub(reserved).saturating_sub(used);
        info.put(nvml::nvmlMemory_v2_t { version, total, reserved, free, used })
    }

    fn nvmlDeviceGetPowerUsage(device: DeviceHandle, milliwatts: Out<c_uint>) with driver => {
        milliwatts.put(description(&driver, device)?.power_milliwatts)
    }

    fn nvmlDeviceGetPowerManagementLimit(device: DeviceHandle, milliwatts: Out<c_uint>) with driver => {
        milliwatts.put(description(&driver, device)?.power_limit_milliwatts.ok_or(Refusal::NotSupported)?)
    }

    fn nvmlDeviceGetEnforcedPowerLimit(device: DeviceHandle, milliwatts: Out<c_uint>) with driver => {
        milliwatts.put(description(&driver, device)?.power_limit_milliwatts.ok_or(Refusal::NotSupported)?)
    }

    fn nvmlDeviceGetTotalEnergyConsumption(device: DeviceHandle, _millijoules: Out<c_ulonglong>) with driver => {
        not_told(&driver, device)
    }

    fn nvmlDeviceGetTemperature(
        device: DeviceHandle,
        sensor: nvml::nvmlTemperatureSensors_t,
        celsius: Out<c_uint>,
    ) with driver => {
        if sensor != nvml::nvmlTemperatureSensors_enum_NVML_TEMPERATURE_GPU {
            return Err(Refusal::InvalidArgument);
        }
        celsius.put(description(&driver, device)?.temperature_celsius)
    }

    fn nvmlDeviceGetUtilizationRates(
        device: DeviceHandle,
        utilization: Out<nvml::nvmlUtilization_t>,
    ) with driver => {
        let state = driver.state()?;
        let gpu = state.gpu(device.gpu()?)?;
        // As on hardware: a divided GPU counts for its instances, and not here.
        if gpu.mig {
            return Err(Refusal::NotSupported);
        }
        let gpu = if gpu.processes.is_empty() { 0 } else { 100 };
        utilization.put(nvml::nvmlUtilization_t { gpu, memory: 0 })
    }

    fn nvmlDeviceGetFanSpeed(device: DeviceHandle, _percent: Out<c_uint>) with driver => {
        not_told(&driver, device)
    }

    fn nvmlDeviceGetPersistenceMode(device: DeviceHandle, mode: Out<nvml::nvmlEnableState_t>) with driver => {
        driver.state()?.gpu(device.gpu()?)?;
        mode.put(nvml::nvmlEnableState_enum_NVML_FEATURE_ENABLED)
    }

    fn nvmlDeviceGetComputeMode(device: DeviceHandle, mode: Out<nvml::nvmlComputeMode_t>) with driver => {
        driver.state()?.gpu(parent_index(&driver, device)?)?;
        mode.put(nvml::nvmlComputeMode_enum_NVML_COMPUTEMODE_DEFAULT)
    }

    fn nvmlDeviceGetPerformanceState(device: DeviceHandle, performance: Out<nvml::nvmlPstates_t>) with driver => {
        driver.state()?.gpu(device.gpu()?)?;
        performance.put(nvml::nvmlPStates_enum_NVML_PSTATE_0)
    }

    fn nvmlDeviceGetEccMode(
        device: DeviceHandle,
        current: Out<nvml::nvmlEnableState_t>,
        pending: Out<nvml::nvmlEnableState_t>,
    ) with driver => {
        pending.check()?;
        driver.state()?.gpu(device.gpu()?)?;
        current.put(nvml::nvmlEnableState_enum_NVML_FEATURE_ENABLED)?;
        pending.put(nvml::nvmlEnableState_enum_NVML_FEATURE_ENABLED)
    }

    fn nvmlDeviceGetTotalEccErrors(
        device: DeviceHandle,
        kind: nvml::nvmlMemoryErrorType_t,
        _counter: nvml::nvmlEccCounterType_t,
        count: Out<c_ulonglong>,
    ) with driver => {
        let state = driver.state()?;
        let gpu = state.gpu(device.gpu()?)?;
        match kind {
            nvml::nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_CORRECTED => count.put(0),
            nvml::nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_UNCORRECTED => count.put(gpu.uncorrected_errors),
            _ => Err(Refusal::InvalidArgument),
        }
    }

    fn nvmlDeviceGetRemappedRows(
        device: DeviceHandle,
        corrected: Out<c_uint>,
        uncorrected: Out<c_uint>,
        pending: Out<c_uint>,
        failed: Out<c_uint>,
    ) with driver => {
        driver.state()?.gpu(device.gpu()?)?;
        for place in [&corrected, &uncorrected, &pending, &failed] {
            place.check()?;
        }
        [&corrected, &uncorrected, &pending, &failed].into_iter().try_for_each(|place| place.put(0))
    }

    // GPUs since Ampere remap rows instead.
    fn nvmlDeviceGetRetiredPages(
        device: DeviceHandle,
        _cause: nvml::nvmlPageRetirementCause_t,
        _count: Out<c_uint>,
        _addresses: Buffer<c_ulonglong>,
    ) with driver => {
        not_told(&driver, device)
    }

    fn nvmlDeviceGetRetiredPagesPendingStatus(
        device: DeviceHandle,
        _pending: Out<nvml::nvmlEnableState_t>,
    ) with driver => {
        not_told(&driver, device)
    }
}

// What runs on them.
export! {
    fn nvmlDeviceGetComputeRunningProcesses(
        device: DeviceHandle,
        count: Out<c_uint>,
        infos: Buffer<nvml::nvmlProcessInfo_v1_t>,
    ) with driver => {
        let short = |info: nvml::nvmlProcessInfo_v2_t| nvml::nvmlProcessInfo_v1_t {
            pid: info.pid,
            usedGpuMemory: info.usedGpuMemory,
        };
        let infos_v1: Vec<_> = processes(&*driver.state()?, device)?.into_iter().map(short).collect();
        infos.put_counted(&count, &infos_v1)
    }

    fn nvmlDeviceGetComputeRunningProcesses_v2(
        device: DeviceHandle,
        count: Out<c_uint>,
        infos: Buffer<nvml::nvmlProcessInfo_v2_t>,
    ) with driver => {
        infos.put_counted(&count, &processes(&*driver.state()?, device)?)
    }

    fn nvmlDeviceGetComputeRunningProcesses_v3(
        device: DeviceHandle,
        count: Out<c_uint>,
        infos: Buffer<nvml::nvmlProcessInfo_v2_t>,
    ) with driver => {
        infos.put_counted(&count, &processes(&*driver.state()?, device)?)
    }

    fn nvmlDeviceGetGraphicsRunningProcesses_v3(
        device: DeviceHandle,
        count: Out<c_uint>,
        _infos: Buffer<nvml::nvmlProcessInfo_v2_t>,
    ) with driver => {
        processes(&*driver.state()?, device)?;
        count.put(0)
    }

    fn nvmlDeviceGetMPSComputeRunningProcesses_v3(
        device: DeviceHandle,
        count: Out<c_uint>,
        _infos: Buffer<nvml::nvmlProcessInfo_v2_t>,
    ) with driver => {
        processes(&*driver.state()?, device)?;
        count.put(0)
    }
}

/// Bytes.
struct Memory {
    total: u64,
    reserved: u64,
    used: u64,
}

fn gpu_count(state: &State) -> Result<c_uint, Refusal> {
    c_uint::try_from(state.gpus.len()).map_err(|_| Refusal::Unknown)
}

fn by_index(driver: &Driver, index: u32, device: &Out<DeviceHandle>) -> Result<(), Refusal> {
    driver.state()?.gpu(index)?;
    device.put(DeviceHandle::new(Device::Gpu(index)))
}

fn by_bus_id(driver: &Driver, bus_id: &In<c_char>, device: &Out<DeviceHandle>) -> Result<(), Refusal> {
    let (wanted, state) = (bus_id.text()?.to_ascii_uppercase(), driver.state()?);
    // The domain may have four digits or eight, or be left out.
    let is_wanted = |index: &c_uint| {
        let long = bus_id_of(*index);
        let ends = [0, 4, 9].into_iter().filter_map(|from| long.get(from..));
        ends.into_iter().any(|id| id == wanted)
    };
    let index = (0..gpu_count(&state)?).find(is_wanted).ok_or(Refusal::NotFound)?;
    state.gpu(index)?;
    device.put(DeviceHandle::new(Device::Gpu(index)))
}

/// GPU n sits alone on PCI bus n + 1 of domain 0.
fn bus_id_of(index: u32) -> String {
    format!("00000000:{:02X}:00.0", index.saturating_add(1))
}

fn device_name(driver: &Driver, device: DeviceHandle) -> Result<String, Refusal> {
    let state = driver.state()?;
    let index = parent_index(driver, device)?;
    let described = usize::try_from(index).ok().and_then(|index| driver.machine().gpus.get(index));
    let own = described.and_then(|gpu| gpu.name.clone());
    let name = own.map_or_else(|| state.gpu(index)?.model().map(|model| model.name.clone()), Ok)?;
    match device.device()? {
        Device::Gpu(_) => Ok(name),
        Device::Mig(key) => {
            let found = state.compute_instance(key)?;
            let profile = found.parent.profile()?;
            let slice = found.parent.compute_profile(found.compute.profile)?.name(profile);
            Ok(format!("{name} MIG {slice}"))
        }
    }
}

/// The index of the GPU a device is or is on.
fn parent_index(driver: &Driver, device: DeviceHandle) -> Result<u32, Refusal> {
    match device.device()? {
        Device::Gpu(index) => driver.state()?.gpu(index).map(|_| index),
        Device::Mig(key) => Ok(driver.state()?.compute_instance(key)?.parent.gpu_index),
    }
}

/// What the machine's description says of a GPU.
fn description(driver: &Driver, device: DeviceHandle) -> Result<&GpuDescription, Refusal> {
    let index = device.gpu()?;
    driver.state()?.gpu(index)?;
    let index = usize::try_from(index).map_err(|_| Refusal::InvalidArgument)?;
    driver.machine().gpus.get(index).ok_or(Refusal::NotSupported)
}

/// For what this hardware does not tell.
fn not_told(driver: &Driver, device: DeviceHandle) -> Result<(), Refusal> {
    parent_index(driver, device).and(Err(Refusal::NotSupported))
}

fn put_pci_info(driver: &Driver, device: DeviceHandle, pci: &Out<nvml::nvmlPciInfo_t>) -> Result<(), Refusal> {
    let index = device.gpu()?;
    let id = driver.state()?.gpu(index)?.model()?.pci_device_id.unwrap_or(0);
    let long = bus_id_of(index);
    pci.put(nvml::nvmlPciInfo_t {
        busIdLegacy: member(long.get(4..).unwrap_or_default()),
        domain: 0,
        bus: index.saturating_add(1),
        device: 0,
        pciDeviceId: id,
        pciSubSystemId: 0,
        busId: member(&long),
    })
}

fn memory(driver: &Driver, device: DeviceHandle) -> Result<Memory, Refusal> {
    let state = driver.state()?;
    let device_is = device.device()?;
    let total = state.memory_mib(device_is)?.ok_or(Refusal::NotSupported)?;
    let reserved = match device_is {
        // What the largest instance there can be leaves over.
        Device::Gpu(index) => {
            let largest = state.gpu(index)?.model()?.profiles.iter().map(|profile| profile.memory_mib).max();
            largest.map_or(0, |largest| total.saturating_sub(largest))
        }
        Device::Mig(_) => 0,
    };
    let used = state.processes_sharing_memory(device_is)?.iter().map(|process| process.memory_mib).sum::<u64>();
    let bytes = |mib: u64| mib.saturating_mul(MIB);
    Ok(Memory { total: bytes(total), reserved: bytes(reserved), used: bytes(used) })
}

fn processes(state: &State, device: DeviceHandle) -> Result<Vec<nvml::nvmlProcessInfo_v2_t>, Refusal> {
    let info = |process: &Process, gpu_instance, compute_instance| nvml::nvmlProcessInfo_v2_t {
        pid: process.pid,
        usedGpuMemory: process.memory_mib.saturating_mul(MIB),
        gpuInstanceId: gpu_instance,
        computeInstanceId: compute_instance,
    };
    match device.device()? {
        Device::Gpu(index) => {
            let gpu = state.gpu(index)?;
            let whole = gpu.processes.iter().map(|process| info(process, NO_INSTANCE, NO_INSTANCE));
            let on_slices = gpu.mig_devices().flat_map(|(instance, compute)| {
                compute.processes.iter().map(|process| info(process, instance.id, compute.id))
            });
            Ok(whole.chain(on_slices).collect())
        }
        Device::Mig(key) => {
            let found = state.compute_instance(key)?;
            let ids = (found.parent.instance.id, found.compute.id);
            Ok(found.compute.processes.iter().map(|process| info(process, ids.0, ids.1)).collect())
        }
    }
}
