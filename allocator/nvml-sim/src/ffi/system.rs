//! Start, end, versions and error texts.

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint};
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use nvml_wrapper_sys::bindings as nvml;

use super::pointer::{Buffer, Out};
use super::{answer, export, initialize, shut_down};
use crate::refusal::Refusal;

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit() -> nvml::nvmlReturn_t {
    answer(initialize)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> nvml::nvmlReturn_t {
    answer(initialize)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInitWithFlags(_flags: c_uint) -> nvml::nvmlReturn_t {
    answer(initialize)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> nvml::nvmlReturn_t {
    answer(shut_down)
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlErrorString(code: nvml::nvmlReturn_t) -> *const c_char {
    error_text(code).as_ptr()
}

export! {
    fn nvmlSystemGetDriverVersion(version: Buffer<c_char>, length: c_uint) with driver => {
        version.put_text(length, &driver.machine().driver_version)
    }

    fn nvmlSystemGetNVMLVersion(version: Buffer<c_char>, length: c_uint) with driver => {
        // As of NVML: its API version, then the driver's.
        version.put_text(length, &format!("12.{}", driver.machine().driver_version))
    }

    fn nvmlSystemGetCudaDriverVersion(version: Out<c_int>) with driver => {
        version.put(driver.machine().cuda_version)
    }

    fn nvmlSystemGetCudaDriverVersion_v2(version: Out<c_int>) with driver => {
        version.put(driver.machine().cuda_version)
    }

    fn nvmlSystemGetProcessName(pid: c_uint, name: Buffer<c_char>, length: c_uint) with _ => {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).map_err(|_| Refusal::NotFound)?;
        let program = line.split(|&byte| byte == 0).next().unwrap_or_default();
        // NVML cuts the name to the room there is.
        let room = usize::try_from(length).unwrap_or(0).saturating_sub(1);
        let program = String::from_utf8_lossy(program.get(..room).unwrap_or(program)).into_owned();
        name.put_text(length, &program)
    }
}

/// The file this code was loaded from.
pub fn library_path() -> Option<PathBuf> {
    let mut found = MaybeUninit::<libc::Dl_info>::zeroed();
    let here = nvmlInit_v2 as *const () as *const libc::c_void;
    // SAFETY: `here` is an address in this library, `found` a place for the answer; all zeros is a valid one.
    let found = unsafe {
        if libc::dladdr(here, found.as_mut_ptr()) == 0 {
            return None;
        }
        found.assume_init()
    };
    if found.dli_fname.is_null() {
        return None;
    }
    // SAFETY: not null, so a string that lives as long as the library is loaded, and this code is in it.
    let path = unsafe { CStr::from_ptr(found.dli_fname) };
    Some(PathBuf::from(OsStr::from_bytes(path.to_bytes())))
}

fn error_text(code: nvml::nvmlReturn_t) -> &'static CStr {
    match code {
        nvml::nvmlReturn_enum_NVML_SUCCESS => c"The operation was successful",
        nvml::nvmlReturn_enum_NVML_ERROR_UNINITIALIZED => c"Uninitialized",
        nvml::nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT => c"Invalid Argument",
        nvml::nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED => c"Not Supported",
        nvml::nvmlReturn_enum_NVML_ERROR_NO_PERMISSION => c"Insufficient Permissions",
        nvml::nvmlReturn_enum_NVML_ERROR_NOT_FOUND => c"Not Found",
        nvml::nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE => c"Insufficient Size",
        nvml::nvmlReturn_enum_NVML_ERROR_DRIVER_NOT_LOADED => c"Driver Not Loaded",
        nvml::nvmlReturn_enum_NVML_ERROR_TIMEOUT => c"Timeout",
        nvml::nvmlReturn_enum_NVML_ERROR_GPU_IS_LOST => c"GPU is lost",
        nvml::nvmlReturn_enum_NVML_ERROR_RESET_REQUIRED => c"GPU requires restart",
        nvml::nvmlReturn_enum_NVML_ERROR_IN_USE => c"In use by another client",
        nvml::nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_RESOURCES => c"Insufficient Resources",
        nvml::nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH => c"Argument version mismatch",
        _ => c"Unknown Error",
    }
}
