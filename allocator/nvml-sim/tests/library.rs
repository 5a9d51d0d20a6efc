//! The library as its callers see it: through nvml-wrapper, and through NVML's bare functions.

#![allow(unsafe_code, reason = "instances are made by NVML's bare functions")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Machine, Slices};
use nvidia_ml_sim::state::FaultKind;
use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{Brand, EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::device::{DeviceArchitecture, UsedGpuMemory};
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper_sys::bindings::*;

const SUCCESS: nvmlReturn_t = nvmlReturn_enum_NVML_SUCCESS;
const INVALID_ARGUMENT: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
const NOT_SUPPORTED: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED;
const NOT_FOUND: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_NOT_FOUND;
const IN_USE: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_IN_USE;
const INSUFFICIENT_RESOURCES: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_RESOURCES;
const INSUFFICIENT_SIZE: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE;
const GPU_IS_LOST: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST;
const VERSION_MISMATCH: nvmlReturn_t = nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH;

#[test]
fn a_dgx_a100_tells_what_it_is() {
    let machine = Machine::a100(8);
    let nvml = machine.nvml();
    assert_eq!(nvml.device_count().unwrap(), 8);
    assert_eq!(nvml.sys_driver_version().unwrap(), "535.104.05");
    assert_eq!(nvml.sys_cuda_driver_version().unwrap(), 12020);
    let device = nvml.device_by_index(3).unwrap();
    assert_eq!(device.name().unwrap(), "NVIDIA A100-SXM4-40GB");
    assert_eq!(device.brand().unwrap(), Brand::Nvidia);
    assert_eq!(device.architecture().unwrap(), DeviceArchitecture::Ampere);
    assert_eq!(device.cuda_compute_capability().unwrap().major, 8);
    assert_eq!(nvml.device_by_uuid(device.uuid().unwrap()).unwrap().index().unwrap(), 3);
    assert_eq!(nvml.device_by_pci_bus_id(device.pci_info().unwrap().bus_id).unwrap().index().unwrap(), 3);
    assert_eq!(nvml.device_by_pci_bus_id("0000:04:00.0").unwrap().index().unwrap(), 3);
    assert_eq!(device.minor_number().unwrap(), 3);
    assert_eq!(device.power_usage().unwrap(), 55_000);
    assert_eq!(device.temperature(TemperatureSensor::Gpu).unwrap(), 32);
    assert!(matches!(device.enforced_power_limit(), Err(NvmlError::NotSupported)));
    assert!(matches!(device.serial(), Err(NvmlError::NotSupported)));
    assert!(matches!(nvml.device_by_index(8), Err(NvmlError::InvalidArg)));
    assert!(matches!(nvml.device_by_uuid("GPU-0"), Err(NvmlError::NotFound)));
    assert_eq!((device.mig_mode().unwrap().current, device.mig_device_count().unwrap()), (1, 7));
    assert!(matches!(device.utilization_rates(), Err(NvmlError::NotSupported)));
    assert!(matches!(device.mig_device_by_index(0), Err(NvmlError::NotFound)));
    let memory = device.memory_info().unwrap();
    assert_eq!((memory.total, memory.used), (40960 << 20, 0));
    assert_eq!(memory.free + memory.reserved, memory.total);
}

#[test]
fn profiles_and_placements_are_those_of_the_hardware() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let device = nvml.device_by_index(0).unwrap();
    let slices = Slices::new(&nvml, 0);
    // The index a profile is asked with and its id are two numbers.
    let ids: Vec<u32> =
        (0..NVML_GPU_INSTANCE_PROFILE_COUNT).filter_map(|at| Some(device.profile_info(at).ok()?.id)).collect();
    assert_eq!(ids, [19, 14, 9, 5, 0, 20, 15]);
    assert!(matches!(device.profile_info(NVML_GPU_INSTANCE_PROFILE_8_SLICE), Err(NvmlError::NotSupported)));
    assert!(matches!(device.profile_info(99), Err(NvmlError::InvalidArg)));
    assert_eq!(slices.placements(14), [(0, 2), (2, 2), (4, 2)]);
    assert_eq!(slices.placements(15), [(0, 2), (2, 2), (4, 2), (6, 2)]);
    assert_eq!(slices.profile_name(0), "MIG 1g.5gb");
    assert_eq!(slices.remaining(14), 3);
    slices.create(14, 2).unwrap();
    assert_eq!(slices.remaining(14), 2);
    // Everywhere it could ever lie, taken or not.
    assert_eq!(slices.placements(14).len(), 3);
}

#[test]
fn a_slice_lives_dies_and_comes_back_as_another() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let device = nvml.device_by_index(0).unwrap();
    let slices = Slices::new(&nvml, 0);
    let mut uuids = Vec::new();
    for _ in 0..2 {
        let (instance, compute) = slices.slice(14, 2).unwrap();
        let mig = device.mig_device_by_index(0).unwrap();
        assert_eq!(mig.name().unwrap(), "NVIDIA A100-SXM4-40GB MIG 2g.10gb");
        assert_eq!(mig.memory_info().unwrap().total, 9856 << 20);
        assert!(mig.mig_is_mig_device_handle().unwrap() && !device.mig_is_mig_device_handle().unwrap());
        assert_eq!(mig.mig_parent_device().unwrap().uuid().unwrap(), device.uuid().unwrap());
        let attributes = mig.attributes().unwrap();
        assert_eq!((attributes.multiprocessor_count, attributes.memory_size_mb), (28, 9856));
        assert_eq!((attributes.gpu_instance_slice_count, attributes.compute_instance_slice_count), (2, 2));
        assert!(matches!(device.attributes(), Err(NvmlError::NotSupported)));
        assert_eq!(slices.mig_ids(0), (slices.info(instance).id, 0));
        let uuid = mig.uuid().unwrap();
        assert_eq!(nvml.device_by_uuid(uuid.as_str()).unwrap().uuid().unwrap(), uuid);
        uuids.push(uuid);
        assert_eq!(slices.destroy(instance), Err(IN_USE));
        assert_eq!(slices.destroy_compute(compute), Ok(()));
        assert!(matches!(mig.uuid(), Err(NvmlError::InvalidArg)));
        assert_eq!(slices.destroy(instance), Ok(()));
        assert_eq!(slices.destroy(instance), Err(INVALID_ARGUMENT));
    }
    assert!(uuids.iter().all(|uuid| uuid.starts_with("MIG-")));
    assert_ne!(uuids[0], uuids[1]);
}

#[test]
fn instances_are_found_again() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let slices = Slices::new(&nvml, 0);
    let (instance, compute) = slices.slice(9, 4).unwrap();
    slices.create(19, 0).unwrap();
    assert_eq!(slices.instances(9), [instance]);
    assert_eq!(slices.instances(14), []);
    let info = slices.info(instance);
    assert_eq!((info.profileId, info.placement.start, info.placement.size), (9, 4, 4));
    assert_eq!(slices.by_id(info.id), Ok(instance));
    assert_eq!(slices.by_id(99), Err(NOT_FOUND));
    assert_eq!(slices.compute_instances(instance, 2), [compute]);
    let info = slices.compute_info(compute);
    assert_eq!((info.gpuInstance, info.id, info.profileId, info.placement.size), (instance, 0, 2, 3));
}

#[test]
fn what_does_not_fit_is_refused() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let slices = Slices::new(&nvml, 0);
    slices.create(9, 0).unwrap();
    assert_eq!(slices.create(5, 0), Err(INSUFFICIENT_RESOURCES));
    assert_eq!(slices.create(19, 3), Err(INSUFFICIENT_RESOURCES));
    assert_eq!(slices.create(19, 7), Err(INVALID_ARGUMENT));
    assert_eq!(slices.create(14, 5), Err(INVALID_ARGUMENT));
    assert_eq!(slices.create(3, 0), Err(NOT_SUPPORTED));
}

#[test]
fn a_gpu_that_is_not_divided() {
    let machine = Machine::new("[[gpu]]\nmodel = \"H100-80GB\"\npower_limit_watts = 700\nname = \"NVIDIA H100\"\n");
    let nvml = machine.nvml();
    let device = nvml.device_by_index(0).unwrap();
    let slices = Slices::new(&nvml, 0);
    assert_eq!((device.name().unwrap().as_str(), device.enforced_power_limit().unwrap()), ("NVIDIA H100", 700_000));
    assert_eq!((device.mig_mode().unwrap().current, device.mig_device_count().unwrap()), (0, 0));
    assert_eq!(device.utilization_rates().unwrap().gpu, 0);
    machine.tool(&["process", "start", "0", "4711", "--memory-mib", "1000"]);
    assert_eq!(device.utilization_rates().unwrap().gpu, 100);
    assert_eq!(device.running_compute_processes().unwrap()[0].pid, 4711);
    assert_eq!(slices.create(19, 0), Err(NOT_SUPPORTED));
    // Profiles and placements are told all the same.
    assert_eq!(slices.placements(9).len(), 2);
    // Hopper changes its mode at once, but not under a process.
    assert_eq!(device.set_mig_mode(true).unwrap(), IN_USE);
    machine.tool(&["process", "stop", "4711"]);
    assert_eq!(device.set_mig_mode(true).unwrap(), SUCCESS);
    slices.create(19, 0).unwrap();
    assert_eq!(device.set_mig_mode(false).unwrap(), IN_USE);
}

#[test]
fn ampere_changes_its_mode_with_a_reset() {
    let machine = Machine::new("[[gpu]]\nmodel = \"A100-40GB\"\n");
    let nvml = machine.nvml();
    let device = nvml.device_by_index(0).unwrap();
    assert_eq!(device.set_mig_mode(true).unwrap(), nvmlReturn_enum_NVML_ERROR_RESET_REQUIRED);
    let mode = device.mig_mode().unwrap();
    assert_eq!((mode.current, mode.pending), (0, 1));
    machine.tool(&["reset", "0"]);
    assert_eq!(device.mig_mode().unwrap().current, 1);
    Slices::new(&nvml, 0).create(0, 0).unwrap();
}

#[test]
fn a_model_of_which_too_little_is_known_has_no_mig() {
    let machine = Machine::new("[[gpu]]\nmodel = \"B300\"\n");
    let nvml = machine.nvml();
    let device = nvml.device_by_index(0).unwrap();
    assert!(matches!(device.mig_mode(), Err(NvmlError::NotSupported)));
    assert!(matches!(device.memory_info(), Err(NvmlError::NotSupported)));
    assert_eq!(device.mig_device_count().unwrap(), 0);
}

#[test]
fn processes_and_programs_of_others_are_seen_at_once() {
    let machine = Machine::a100(2);
    let nvml = machine.nvml();
    let device = nvml.device_by_index(1).unwrap();
    let slices = Slices::new(&nvml, 1);
    // Made by another process, seen here, and the other way round.
    let uuid = machine.tool(&["create", "1", "2g.10gb", "--start", "0"]).trim().to_owned();
    let mig = nvml.device_by_uuid(uuid.as_str()).unwrap();
    slices.slice(19, 6).unwrap();
    let shown = machine.tool(&["show"]);
    let here = device.mig_device_by_index(1).unwrap().uuid().unwrap();
    assert!(shown.contains(&uuid) && shown.contains(&here), "{shown}");
    machine.tool(&["process", "start", &uuid, "99", "--memory-mib", "500"]);
    let process = &mig.running_compute_processes().unwrap()[0];
    assert_eq!((process.pid, process.gpu_instance_id), (99, Some(slices.mig_ids(0).0)));
    assert!(matches!(process.used_gpu_memory, UsedGpuMemory::Used(bytes) if bytes == 500 << 20));
    assert_eq!(device.running_compute_processes().unwrap().len(), 1);
    assert_eq!(mig.memory_info().unwrap().used, 500 << 20);
    // What runs keeps its slice.
    assert!(!machine.try_tool(&["destroy", &uuid]).status.success());
    machine.tool(&["process", "stop", "99"]);
    machine.tool(&["destroy", &uuid]);
    assert!(matches!(nvml.device_by_uuid(uuid.as_str()), Err(NvmlError::NotFound)));
    assert_eq!(slices.instances(14), []);
}

#[test]
fn a_reboot_drops_the_slices_and_keeps_the_gpus() {
    let machine = Machine::a100(2);
    let nvml = machine.nvml();
    let device = nvml.device_by_index(0).unwrap();
    let slices = Slices::new(&nvml, 0);
    let (instance, _) = slices.slice(9, 4).unwrap();
    let uuid = device.uuid().unwrap();
    let boot = |shown: String| shown.lines().next().unwrap().to_owned();
    let before = boot(machine.tool(&["show"]));
    machine.tool(&["reboot"]);
    assert_ne!(boot(machine.tool(&["show"])), before);
    assert!(matches!(device.mig_device_by_index(0), Err(NvmlError::NotFound)));
    assert_eq!(slices.destroy(instance), Err(INVALID_ARGUMENT));
    assert_eq!((device.uuid().unwrap(), device.mig_mode().unwrap().current), (uuid, 1));
    slices.slice(0, 0).unwrap();
}

#[test]
fn fault_destroy_in_use() {
    let machine =
        Machine::new("[[gpu]]\nmodel = \"A100-40GB\"\nmig = true\n[[fault]]\nkind = \"destroy-in-use\"\ntimes = 2\n");
    let nvml = machine.nvml();
    let slices = Slices::new(&nvml, 0);
    let (instance, compute) = slices.slice(19, 0).unwrap();
    assert_eq!(slices.destroy_compute(compute), Err(IN_USE));
    assert_eq!(slices.destroy_compute(compute), Err(IN_USE));
    assert_eq!(slices.destroy_compute(compute), Ok(()));
    machine.tool(&["fault", "destroy-in-use", "--on", "gpu-instance", "--gpu", "0"]);
    assert_eq!(slices.destroy(instance), Err(IN_USE));
    assert_eq!(slices.destroy(instance), Ok(()));
}

#[test]
fn fault_gpu_instance_left() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let slices = Slices::new(&nvml, 0);
    machine.tool(&["fault", "gpu-instance-left"]);
    let (instance, compute) = slices.slice(19, 0).unwrap();
    assert_eq!(slices.destroy_compute(compute), Ok(()));
    assert_eq!(slices.destroy(instance), Err(IN_USE));
    // It is there, and no MIG device.
    assert_eq!(slices.instances(19), [instance]);
    assert_eq!(slices.compute_instances(instance, 0), []);
    assert!(matches!(nvml.device_by_index(0).unwrap().mig_device_by_index(0), Err(NvmlError::NotFound)));
    assert_eq!(slices.destroy(instance), Ok(()));
}

#[test]
fn fault_insufficient_resources() {
    let machine = Machine::a100(2);
    let nvml = machine.nvml();
    let slices = Slices::new(&nvml, 1);
    machine.tool(&["fault", "insufficient-resources", "--gpu", "1", "--on", "gpu-instance"]);
    Slices::new(&nvml, 0).create(19, 0).unwrap();
    assert_eq!(slices.create(19, 0), Err(INSUFFICIENT_RESOURCES));
    let instance = slices.create(19, 0).unwrap();
    machine.tool(&["fault", "insufficient-resources", "--on", "compute-instance"]);
    assert_eq!(slices.create_compute(instance, 0), Err(INSUFFICIENT_RESOURCES));
    assert!(slices.create_compute(instance, 0).is_ok());
    machine.tool(&["fault", "insufficient-resources", "--times", "9"]);
    machine.tool(&["fault", "clear"]);
    slices.create(19, 1).unwrap();
}

#[test]
fn fault_slow_destroy_holds_up_nobody_else() {
    let machine = Machine::a100(2);
    let nvml = machine.nvml();
    let slices = Slices::new(&nvml, 0);
    let (instance, compute) = slices.slice(19, 0).unwrap();
    slices.destroy_compute(compute).unwrap();
    machine.tool(&["fault", "slow-destroy", "--on", "gpu-instance", "--milliseconds", "15000", "--times", "1"]);
    let set = nvml.create_event_set().unwrap();
    let device = nvml.device_by_index(0).unwrap();
    let set = device.register_events(EventTypes::MIG_CONFIG_CHANGE, set).map_err(|error| error.error).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let handle = instance.addr();
        let (nvml, done) = (&nvml, &done);
        let slow = scope.spawn(move || {
            let begun = Instant::now();
            let code = unsafe { nvml.lib().nvmlGpuInstanceDestroy(ptr::without_provenance_mut(handle)) };
            done.store(true, Ordering::SeqCst);
            (code, begun.elapsed())
        });
        // As soon as the fault is used up the destroy is under way; no event tells that, and none comes before
        // the end.
        let until = Instant::now() + Duration::from_secs(60);
        while machine.state().faults.iter().any(|fault| fault.kind == FaultKind::SlowDestroy) {
            assert!(Instant::now() < until, "the destroy does not begin");
            assert!(matches!(set.wait(10), Err(NvmlError::Timeout)));
        }
        let other = Slices::new(nvml, 1);
        let (instance, compute) = other.slice(0, 0).unwrap();
        other.destroy_compute(compute).unwrap();
        other.destroy(instance).unwrap();
        assert_eq!(slices.instances(19).len(), 1, "still there");
        assert!(!done.load(Ordering::SeqCst), "the other GPU did not wait");
        assert_eq!(set.wait(60_000).unwrap().event_type, EventTypes::MIG_CONFIG_CHANGE);
        assert_eq!(slices.instances(19), []);
        let (code, time) = slow.join().unwrap();
        assert_eq!(code, SUCCESS);
        assert!(time >= Duration::from_secs(15));
    });
}

#[test]
fn fault_a_gpu_falls_off_the_bus() {
    let machine = Machine::a100(2);
    let nvml = machine.nvml();
    let device = nvml.device_by_index(1).unwrap();
    let slices = Slices::new(&nvml, 1);
    let (instance, compute) = slices.slice(19, 0).unwrap();
    let mig = device.mig_device_by_index(0).unwrap();
    let set = nvml.create_event_set().unwrap();
    let set = device.register_events(EventTypes::CRITICAL_XID_ERROR, set).map_err(|error| error.error).unwrap();
    machine.tool(&["fault", "lost", "1"]);
    let event = set.wait(10_000).unwrap();
    assert!(matches!(event.event_data, Some(XidError::Value(79))));
    assert_eq!(nvml.device_count().unwrap(), 2);
    assert!(matches!(device.uuid(), Err(NvmlError::GpuLost)));
    assert!(matches!(device.memory_info(), Err(NvmlError::GpuLost)));
    assert!(matches!(mig.uuid(), Err(NvmlError::GpuLost)));
    assert!(matches!(nvml.device_by_index(1), Err(NvmlError::GpuLost)));
    assert_eq!(slices.create(19, 1), Err(GPU_IS_LOST));
    assert_eq!(slices.destroy_compute(compute), Err(GPU_IS_LOST));
    assert_eq!(slices.destroy(instance), Err(GPU_IS_LOST));
    // The others go on.
    Slices::new(&nvml, 0).slice(0, 0).unwrap();
    machine.tool(&["reset", "1"]);
    assert!(matches!(device.mig_device_by_index(0), Err(NvmlError::NotFound)));
    slices.slice(0, 0).unwrap();
}

#[test]
fn events_of_other_processes_wake_the_one_who_waits() {
    let machine = Machine::a100(2);
    let nvml = machine.nvml();
    let device = nvml.device_by_index(1).unwrap();
    let kinds = EventTypes::CRITICAL_XID_ERROR | EventTypes::MIG_CONFIG_CHANGE;
    assert!(device.supported_event_types().unwrap().contains(kinds));
    machine.tool(&["xid", "1", "13"]);
    let set = nvml.create_event_set().unwrap();
    let set = device.register_events(kinds, set).map_err(|error| error.error).unwrap();
    // Neither what was before nor what is of other GPUs.
    machine.tool(&["xid", "0", "31"]);
    assert!(matches!(set.wait(0), Err(NvmlError::Timeout)));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(move || {
            let event = set.wait(60_000).unwrap();
            assert!(matches!(event.event_data, Some(XidError::Value(48))), "{event:?}");
            assert_eq!(event.device.index().unwrap(), 1);
            let event = set.wait(60_000).unwrap();
            assert_eq!(event.event_type, EventTypes::MIG_CONFIG_CHANGE);
        });
        machine.tool(&["xid", "1", "48"]);
        machine.tool(&["create", "1", "7g.40gb"]);
        waiting.join().unwrap();
    });
    assert!(!machine.try_tool(&["xid", "7", "48"]).status.success());
}

#[test]
fn memory_errors_are_counted_until_a_reset() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let device = nvml.device_by_index(0).unwrap();
    let errors = || device.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile).unwrap();
    assert_eq!(errors(), 0);
    machine.tool(&["memory-errors", "0", "3"]);
    assert_eq!(errors(), 3);
    machine.tool(&["reset", "0"]);
    assert_eq!(errors(), 0);
}

#[test]
fn nonsense_is_refused_and_not_followed() {
    let machine = Machine::a100(1);
    let nvml = machine.nvml();
    let lib = nvml.lib();
    unsafe {
        let gpu = nvml.device_by_index(0).unwrap().handle();
        let mut instance = ptr::null_mut();
        let mut number = 0;
        let mut text = [0; 8];
        let mut set = ptr::null_mut();
        assert_eq!(lib.nvmlDeviceGetCount_v2(ptr::null_mut()), INVALID_ARGUMENT);
        assert_eq!(lib.nvmlDeviceGetHandleByUUID(ptr::null(), &mut instance), INVALID_ARGUMENT);
        assert_eq!(lib.nvmlDeviceGetUUID(gpu, ptr::null_mut(), 96), INVALID_ARGUMENT);
        assert_eq!(lib.nvmlDeviceGetUUID(gpu, text.as_mut_ptr(), 8), INSUFFICIENT_SIZE);
        assert_eq!(lib.nvmlDeviceGetMigMode(gpu, &mut number, ptr::null_mut()), INVALID_ARGUMENT);
        assert_eq!(lib.nvmlDeviceCreateGpuInstance(gpu, 19, ptr::null_mut()), INVALID_ARGUMENT);
        let mut handle = ptr::null_mut();
        assert_eq!(lib.nvmlDeviceCreateGpuInstanceWithPlacement(gpu, 19, ptr::null(), &mut handle), INVALID_ARGUMENT);
        assert_eq!(lib.nvmlDeviceGetGpuInstances(gpu, 19, ptr::null_mut(), &mut number), INVALID_ARGUMENT);
        assert_eq!(
            lib.nvmlDeviceGetGpuInstancePossiblePlacements_v2(gpu, 19, ptr::null_mut(), ptr::null_mut()),
            INVALID_ARGUMENT
        );
        assert_eq!(lib.nvmlEventSetWait_v2(ptr::null_mut(), ptr::null_mut(), 0), INVALID_ARGUMENT);
        assert_eq!(lib.nvmlEventSetFree(ptr::null_mut()), INVALID_ARGUMENT);
        // Handles that are null, made up, or of another kind.
        for handle in [0, 1, 0xdead_beef, usize::MAX, gpu.addr()] {
            assert_eq!(lib.nvmlGpuInstanceDestroy(ptr::without_provenance_mut(handle)), INVALID_ARGUMENT);
            assert_eq!(lib.nvmlComputeInstanceDestroy(ptr::without_provenance_mut(handle)), INVALID_ARGUMENT);
        }
        assert_eq!(lib.nvmlDeviceGetIndex(ptr::null_mut(), &mut number), INVALID_ARGUMENT);
        // Structures of a version that does not exist.
        let mut memory: nvmlMemory_v2_t = std::mem::zeroed();
        assert_eq!(lib.nvmlDeviceGetMemoryInfo_v2(gpu, &mut memory), VERSION_MISMATCH);
        // Too little room: how much is needed is told.
        let mut room = 1;
        let mut place = nvmlGpuInstancePlacement_t { start: 0, size: 0 };
        let code = lib.nvmlDeviceGetGpuInstancePossiblePlacements_v2(gpu, 19, &mut place, &mut room);
        assert_eq!((code, room), (INSUFFICIENT_SIZE, 7));
        // A set that was freed.
        assert_eq!(lib.nvmlEventSetCreate(&mut set), SUCCESS);
        assert_eq!(lib.nvmlEventSetFree(set), SUCCESS);
        assert_eq!(lib.nvmlDeviceRegisterEvents(gpu, 8, set), INVALID_ARGUMENT);
        assert_eq!(machine.tool(&["show"]).matches("GPU instance").count(), 0);
    }
}

#[test]
fn init_and_shutdown_are_counted() {
    let machine = Machine::a100(1);
    let first = machine.nvml();
    let second = machine.nvml();
    first.shutdown().unwrap();
    assert_eq!(second.device_count().unwrap(), 1);
    unsafe {
        let lib = second.lib();
        assert_eq!(lib.nvmlShutdown(), SUCCESS);
        let mut count = 0;
        assert_eq!(lib.nvmlDeviceGetCount_v2(&mut count), nvmlReturn_enum_NVML_ERROR_UNINITIALIZED);
        assert_eq!(lib.nvmlShutdown(), nvmlReturn_enum_NVML_ERROR_UNINITIALIZED);
        let text = std::ffi::CStr::from_ptr(lib.nvmlErrorString(IN_USE));
        assert_eq!(text.to_str().unwrap(), "In use by another client");
    }
}

#[test]
fn links_lead_to_the_same_machine() {
    use std::os::unix::fs::symlink;
    let machine = Machine::a100(1);
    let elsewhere = tempfile::tempdir().unwrap();
    let library = elsewhere.path().join("libnvidia-ml.so.1");
    // The library and its description, each by a link, in a folder of their own.
    symlink(nvidia_ml_sim::find_library().unwrap(), &library).unwrap();
    symlink(machine.file(), elsewhere.path().join("libnvidia-ml.so.1.toml")).unwrap();
    let nvml = nvml_wrapper::Nvml::builder().lib_path(library.as_os_str()).init().unwrap();
    Slices::new(&nvml, 0).slice(0, 0).unwrap();
    assert!(machine.tool(&["show"]).contains("7g.40gb"));
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 2);
}

#[test]
fn a_machine_that_cannot_be_read_has_no_driver() {
    for text in ["[[gpu]]\nmodel = \"A101\"\n", "[[gpu", ""] {
        let machine = Machine::new(text);
        let path = machine.library().into_os_string();
        let error = nvml_wrapper::Nvml::builder().lib_path(&path).init().unwrap_err();
        assert!(matches!(error, NvmlError::DriverNotLoaded), "{error:?}");
    }
}
