//! What NVML's handles mean here: a kind in the highest byte and a number below it.
//!
//! They are never followed as pointers, and they mean the same in every process. Numbers of instances are
//! never used twice, so that the handle of a destroyed instance is invalid for ever.

use std::ffi::c_void;
use std::ptr;

use nvml_wrapper_sys::bindings as nvml;

use crate::refusal::Refusal;
use crate::state::Device;

const KIND_SHIFT: u32 = 56;
const NUMBER: u64 = (1 << KIND_SHIFT) - 1;

const GPU: u64 = 1;
const MIG_DEVICE: u64 = 2;
const GPU_INSTANCE: u64 = 3;
const COMPUTE_INSTANCE: u64 = 4;
const EVENT_SET: u64 = 5;

/// `nvmlDevice_t`: a GPU or a MIG device.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct DeviceHandle(*mut c_void);

/// `nvmlGpuInstance_t`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct GpuInstanceHandle(*mut c_void);

/// `nvmlComputeInstance_t`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct ComputeInstanceHandle(*mut c_void);

/// `nvmlEventSet_t`.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct EventSetHandle(*mut c_void);

impl DeviceHandle {
    /// The handle of `device`.
    pub fn new(device: Device) -> Self {
        match device {
            Device::Gpu(index) => Self(encode(GPU, index.into())),
            Device::Mig(key) => Self(encode(MIG_DEVICE, key)),
        }
    }

    /// It as a member of NVML's structures.
    pub fn raw(self) -> *mut nvml::nvmlDevice_st {
        self.0.cast()
    }

    /// Which device it is.
    pub fn device(self) -> Result<Device, Refusal> {
        let number = |kind| decode(kind, self.0);
        let gpu = |number| u32::try_from(number).map(Device::Gpu).map_err(|_| Refusal::InvalidArgument);
        number(GPU).and_then(gpu).or_else(|_| number(MIG_DEVICE).map(Device::Mig))
    }

    /// The index of the GPU it is; what is asked of it cannot be asked of a MIG device.
    pub fn gpu(self) -> Result<u32, Refusal> {
        match self.device()? {
            Device::Gpu(index) => Ok(index),
            Device::Mig(_) => Err(Refusal::NotSupported),
        }
    }

    /// The key of the MIG device it is; what is asked of it cannot be asked of a GPU.
    pub fn mig_device(self) -> Result<u64, Refusal> {
        match self.device()? {
            Device::Gpu(_) => Err(Refusal::NotSupported),
            Device::Mig(key) => Ok(key),
        }
    }
}

impl GpuInstanceHandle {
    /// The handle of the GPU instance with key `key`.
    pub fn new(key: u64) -> Self {
        Self(encode(GPU_INSTANCE, key))
    }

    /// It as a member of NVML's structures.
    pub fn raw(self) -> *mut nvml::nvmlGpuInstance_st {
        self.0.cast()
    }

    /// The key.
    pub fn key(self) -> Result<u64, Refusal> {
        decode(GPU_INSTANCE, self.0)
    }
}

impl ComputeInstanceHandle {
    /// The handle of the compute instance with key `key`.
    pub fn new(key: u64) -> Self {
        Self(encode(COMPUTE_INSTANCE, key))
    }

    /// The key.
    pub fn key(self) -> Result<u64, Refusal> {
        decode(COMPUTE_INSTANCE, self.0)
    }
}

impl EventSetHandle {
    /// The handle of event set `number`.
    pub fn new(number: u64) -> Self {
        Self(encode(EVENT_SET, number))
    }

    /// The number.
    pub fn number(self) -> Result<u64, Refusal> {
        decode(EVENT_SET, self.0)
    }
}

fn encode(kind: u64, number: u64) -> *mut c_void {
    let bits = kind << KIND_SHIFT | number & NUMBER;
    // Handles are 64 bits wide wherever NVIDIA has a driver.
    ptr::without_provenance_mut(usize::try_from(bits).unwrap_or(0))
}

fn decode(kind: u64, handle: *mut c_void) -> Result<u64, Refusal> {
    let bits = u64::try_from(handle.addr()).map_err(|_| Refusal::InvalidArgument)?;
    if bits >> KIND_SHIFT == kind { Ok(bits & NUMBER) } else { Err(Refusal::InvalidArgument) }
}
