//! A machine of its own for every test, seen through nvml-wrapper and through other processes.

#![allow(unsafe_code, reason = "NVML's bare functions")]
#![allow(dead_code, reason = "not every test file uses everything")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nvidia_ml_sim::state::State;
use nvml_wrapper::Nvml;
use nvml_wrapper_sys::bindings::*;

/// A folder with a copy of the library and, beside it, the machine it answers for. (A process loads one file
/// once; a copy is another file with a machine of its own.)
pub(crate) struct Machine {
    folder: tempfile::TempDir,
}

impl Machine {
    /// The machine that `description` tells of.
    pub(crate) fn new(description: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("libnvidia-ml.so.toml"), description).unwrap();
        std::fs::copy(
            nvidia_ml_sim::find_library().expect("the library is built"),
            folder.path().join("libnvidia-ml.so"),
        )
        .unwrap();
        Self { folder }
    }

    /// `count` A100-40GB in MIG mode.
    pub(crate) fn a100(count: u32) -> Self {
        Self::new(&format!("[[gpu]]\nmodel = \"A100-40GB\"\nmig = true\ncount = {count}\n"))
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.folder.path().join("libnvidia-ml.so.toml")
    }

    pub(crate) fn library(&self) -> PathBuf {
        self.folder.path().join("libnvidia-ml.so")
    }

    /// Where its state is kept.
    pub(crate) fn state_file(&self) -> PathBuf {
        self.folder.path().join("libnvidia-ml.so.state.json")
    }

    /// The machine as it is now.
    pub(crate) fn state(&self) -> State {
        serde_json::from_slice(&std::fs::read(self.state_file()).unwrap()).unwrap()
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn nvml(&self) -> Nvml {
        let path: OsString = self.library().into();
        Nvml::builder().lib_path(&path).init().unwrap()
    }

    /// Runs the tool; its output if it succeeded.
    pub(crate) fn tool(&self, arguments: &[&str]) -> String {
        let output = self.try_tool(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn try_tool(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nvml-sim"));
        command.arg("--machine").arg(self.file()).args(arguments);
        command
    }
}

/// The instances of one GPU, by NVML's bare functions: nvml-wrapper has none for them.
pub(crate) struct Slices<'a> {
    lib: &'a NvmlLib,
    gpu: nvmlDevice_t,
}

impl<'a> Slices<'a> {
    pub(crate) fn new(nvml: &'a Nvml, index: u32) -> Self {
        let gpu = unsafe { nvml.device_by_index(index).unwrap().handle() };
        Self { lib: nvml.lib(), gpu }
    }

    /// A GPU instance and a compute instance that takes the whole of it.
    pub(crate) fn slice(&self, profile: u32, start: u32) -> Result<(nvmlGpuInstance_t, nvmlComputeInstance_t), u32> {
        let whole = match profile {
            0 => 4,
            5 => 3,
            9 => 2,
            14 => 1,
            _ => 0,
        };
        let instance = self.create(profile, start)?;
        Ok((instance, self.create_compute(instance, whole)?))
    }

    pub(crate) fn create(&self, profile: u32, start: u32) -> Result<nvmlGpuInstance_t, u32> {
        let size = self.placements(profile).first().map_or(0, |placement| placement.1);
        let place = nvmlGpuInstancePlacement_t { start, size };
        made(|instance| unsafe {
            self.lib.nvmlDeviceCreateGpuInstanceWithPlacement(self.gpu, profile, &raw const place, instance)
        })
    }

    pub(crate) fn create_compute(&self, parent: nvmlGpuInstance_t, profile: u32) -> Result<nvmlComputeInstance_t, u32> {
        made(|compute| unsafe { self.lib.nvmlGpuInstanceCreateComputeInstance(parent, profile, compute) })
    }

    pub(crate) fn destroy(&self, instance: nvmlGpuInstance_t) -> Result<(), u32> {
        done(unsafe { self.lib.nvmlGpuInstanceDestroy(instance) })
    }

    pub(crate) fn destroy_compute(&self, compute: nvmlComputeInstance_t) -> Result<(), u32> {
        done(unsafe { self.lib.nvmlComputeInstanceDestroy(compute) })
    }

    pub(crate) fn instances(&self, profile: u32) -> Vec<nvmlGpuInstance_t> {
        let mut instances = vec![std::ptr::null_mut(); 8];
        let mut count = 0;
        let code =
            unsafe { self.lib.nvmlDeviceGetGpuInstances(self.gpu, profile, instances.as_mut_ptr(), &raw mut count) };
        assert_eq!(code, 0);
        instances.truncate(usize::try_from(count).unwrap());
        instances
    }

    pub(crate) fn by_id(&self, id: u32) -> Result<nvmlGpuInstance_t, u32> {
        made(|instance| unsafe { self.lib.nvmlDeviceGetGpuInstanceById(self.gpu, id, instance) })
    }

    pub(crate) fn info(&self, instance: nvmlGpuInstance_t) -> nvmlGpuInstanceInfo_t {
        let mut info: nvmlGpuInstanceInfo_t = unsafe { std::mem::zeroed() };
        assert_eq!(unsafe { self.lib.nvmlGpuInstanceGetInfo(instance, &raw mut info) }, 0);
        info
    }

    pub(crate) fn compute_instances(&self, parent: nvmlGpuInstance_t, profile: u32) -> Vec<nvmlComputeInstance_t> {
        let mut instances = vec![std::ptr::null_mut(); 8];
        let mut count = 0;
        let code = unsafe {
            self.lib.nvmlGpuInstanceGetComputeInstances(parent, profile, instances.as_mut_ptr(), &raw mut count)
        };
        assert_eq!(code, 0);
        instances.truncate(usize::try_from(count).unwrap());
        instances
    }

    pub(crate) fn compute_info(&self, compute: nvmlComputeInstance_t) -> nvmlComputeInstanceInfo_t {
        let mut info: nvmlComputeInstanceInfo_t = unsafe { std::mem::zeroed() };
        assert_eq!(unsafe { self.lib.nvmlComputeInstanceGetInfo_v2(compute, &raw mut info) }, 0);
        info
    }

    /// (start, size), everywhere the profile can lie.
    pub(crate) fn placements(&self, profile: u32) -> Vec<(u32, u32)> {
        let mut places = vec![nvmlGpuInstancePlacement_t { start: 0, size: 0 }; 16];
        let mut count = 16;
        let ask = unsafe {
            let places = places.as_mut_ptr();
            self.lib.nvmlDeviceGetGpuInstancePossiblePlacements_v2(self.gpu, profile, places, &raw mut count)
        };
        if ask != 0 {
            return Vec::new();
        }
        places.iter().take(usize::try_from(count).unwrap()).map(|place| (place.start, place.size)).collect()
    }

    pub(crate) fn remaining(&self, profile: u32) -> u32 {
        let mut count = 0;
        let code = unsafe { self.lib.nvmlDeviceGetGpuInstanceRemainingCapacity(self.gpu, profile, &raw mut count) };
        assert_eq!(code, 0);
        count
    }

    pub(crate) fn profile_name(&self, index: u32) -> String {
        let mut info: nvmlGpuInstanceProfileInfo_v2_t = unsafe { std::mem::zeroed() };
        info.version = u32::try_from(size_of::<nvmlGpuInstanceProfileInfo_v2_t>()).unwrap() | 2 << 24;
        assert_eq!(unsafe { self.lib.nvmlDeviceGetGpuInstanceProfileInfoV(self.gpu, index, &raw mut info) }, 0);
        unsafe { std::ffi::CStr::from_ptr(info.name.as_ptr()) }.to_str().unwrap().to_owned()
    }

    /// Ids of the GPU instance and compute instance of MIG device `index`.
    pub(crate) fn mig_ids(&self, index: u32) -> (u32, u32) {
        let mig = made(|mig| unsafe { self.lib.nvmlDeviceGetMigDeviceHandleByIndex(self.gpu, index, mig) }).unwrap();
        let (mut instance, mut compute) = (0, 0);
        assert_eq!(unsafe { self.lib.nvmlDeviceGetGpuInstanceId(mig, &raw mut instance) }, 0);
        assert_eq!(unsafe { self.lib.nvmlDeviceGetComputeInstanceId(mig, &raw mut compute) }, 0);
        (instance, compute)
    }
}

fn made<T>(call: impl FnOnce(*mut *mut T) -> nvmlReturn_t) -> Result<*mut T, u32> {
    let mut handle = std::ptr::null_mut();
    done(call(&raw mut handle)).map(|()| handle)
}

fn done(code: nvmlReturn_t) -> Result<(), u32> {
    if code == 0 { Ok(()) } else { Err(code) }
}
