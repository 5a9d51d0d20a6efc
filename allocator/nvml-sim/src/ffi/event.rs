//! Event sets.

use std::collections::BTreeMap;
use std::ffi::{c_uint, c_ulonglong};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nvml_wrapper_sys::bindings as nvml;

use super::export;
use super::handle::{DeviceHandle, EventSetHandle};
use super::pointer::Out;
use crate::events::{EventSet, KINDS};
use crate::refusal::Refusal;
use crate::state::Device;

/// Event sets of one process.
const MAX_SETS: usize = 1024;
/// How NVML says that an event is of no instance.
const NO_INSTANCE: c_uint = c_uint::MAX;

struct Sets {
    next: u64,
    sets: BTreeMap<u64, Arc<EventSet>>,
}

static SETS: Mutex<Sets> = Mutex::new(Sets { next: 1, sets: BTreeMap::new() });

export! {
    fn nvmlEventSetCreate(set: Out<EventSetHandle>) with driver => {
        set.check()?;
        let new = Arc::new(EventSet::new(driver)?);
        let mut all = sets();
        if all.sets.len() >= MAX_SETS {
            return Err(Refusal::InsufficientResources);
        }
        let number = all.next;
        all.next = number.saturating_add(1);
        all.sets.insert(number, new);
        set.put(EventSetHandle::new(number))
    }

    fn nvmlDeviceRegisterEvents(device: DeviceHandle, kinds: c_ulonglong, set: EventSetHandle) with _ => {
        find(set)?.register(device.gpu()?, kinds)
    }

    fn nvmlDeviceGetSupportedEventTypes(device: DeviceHandle, kinds: Out<c_ulonglong>) with driver => {
        driver.state()?.gpu(device.gpu()?)?;
        kinds.put(KINDS)
    }

    fn nvmlEventSetWait(set: EventSetHandle, data: Out<nvml::nvmlEventData_t>, milliseconds: c_uint) with _ => {
        wait(set, &data, milliseconds)
    }

    fn nvmlEventSetWait_v2(set: EventSetHandle, data: Out<nvml::nvmlEventData_t>, milliseconds: c_uint) with _ => {
        wait(set, &data, milliseconds)
    }

    fn nvmlEventSetFree(set: EventSetHandle) with _ => {
        sets().sets.remove(&set.number()?).map(drop).ok_or(Refusal::InvalidArgument)
    }
}

/// At the last `nvmlShutdown`.
pub fn free_all() {
    sets().sets.clear();
}

fn wait(set: EventSetHandle, data: &Out<nvml::nvmlEventData_t>, milliseconds: c_uint) -> Result<(), Refusal> {
    data.check()?;
    let event = find(set)?.wait(Duration::from_millis(milliseconds.into()))?;
    data.put(nvml::nvmlEventData_t {
        device: DeviceHandle::new(Device::Gpu(event.gpu)).raw(),
        eventType: event.kind,
        eventData: event.data,
        gpuInstanceId: event.gpu_instance.unwrap_or(NO_INSTANCE),
        computeInstanceId: event.compute_instance.unwrap_or(NO_INSTANCE),
    })
}

fn find(set: EventSetHandle) -> Result<Arc<EventSet>, Refusal> {
    sets().sets.get(&set.number()?).cloned().ok_or(Refusal::InvalidArgument)
}

fn sets() -> MutexGuard<'static, Sets> {
    SETS.lock().unwrap_or_else(PoisonError::into_inner)
}
