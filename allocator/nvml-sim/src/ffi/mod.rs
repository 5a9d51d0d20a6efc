//! NVML's C functions: from pointers and numbers to the driver and back.
//!
//! `pointer` and `handle` say what callers' pointers mean; the other files hold one exported function after
//! the other, each of which only translates. No panic leaves one, and null where it may not be is an invalid
//! argument.

#![allow(unsafe_code, reason = "the functions of a C library: exported names, callers' pointers")]
#![allow(unreachable_pub, reason = "callers find these functions by name in the shared library")]
#![allow(missing_docs, non_snake_case, reason = "the functions are NVIDIA's; nvml.h documents them")]

mod compute_instance;
mod device;
mod event;
mod gpu_instance;
mod handle;
mod mig_device;
mod pointer;
mod system;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvml_wrapper_sys::bindings as nvml;

use crate::driver::Driver;
use crate::machine::{MACHINE_VARIABLE, Machine};
use crate::refusal::Refusal;

/// Between `nvmlInit` and the `nvmlShutdown` that answers the first of them.
struct Loaded {
    driver: Arc<Driver>,
    inits: u64,
}

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// Turns an answer into NVML's number for it.
fn answer(body: impl FnOnce() -> Result<(), Refusal>) -> nvml::nvmlReturn_t {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => nvml::nvmlReturn_enum_NVML_SUCCESS,
        Ok(Err(refusal)) => refusal.code(),
        Err(_) => Refusal::Unknown.code(),
    }
}

/// Exports functions of NVML. Each body sees the driver under the name it chooses.
macro_rules! export {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) with $driver:pat => $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($argument: $type),*) -> nvml_wrapper_sys::bindings::nvmlReturn_t {
            $crate::ffi::answer(|| {
                let $driver = $crate::ffi::driver()?;
                $body
            })
        }
    )*};
}
use export;

/// The driver of the machine.
fn driver() -> Result<Arc<Driver>, Refusal> {
    loaded().as_ref().map(|loaded| Arc::clone(&loaded.driver)).ok_or(Refusal::Uninitialized)
}

fn initialize() -> Result<(), Refusal> {
    let mut loaded = loaded();
    if let Some(loaded) = loaded.as_mut() {
        loaded.inits = loaded.inits.saturating_add(1);
        return Ok(());
    }
    // NVML has only numbers for errors, so the reason goes to standard error.
    let Some(path) = machine_path() else {
        eprintln!("nvml-sim: no machine to simulate: name its description in {MACHINE_VARIABLE}");
        return Err(Refusal::DriverNotLoaded);
    };
    let driver = Machine::load(&path).and_then(Driver::start).map_err(|error| {
        eprintln!("nvml-sim: {error}");
        Refusal::DriverNotLoaded
    })?;
    *loaded = Some(Loaded { driver: Arc::new(driver), inits: 1 });
    Ok(())
}

fn shut_down() -> Result<(), Refusal> {
    let mut loaded = loaded();
    let now = loaded.as_mut().ok_or(Refusal::Uninitialized)?;
    now.inits = now.inits.saturating_sub(1);
    if now.inits == 0 {
        *loaded = None;
        event::free_all();
    }
    Ok(())
}

/// The description that lies beside this library under its name and `.toml`, or else the one that the variable
/// names. With copies of the library one process can see several machines.
fn machine_path() -> Option<PathBuf> {
    let beside = system::library_path().map(|library| {
        let mut path = library.into_os_string();
        path.push(".toml");
        PathBuf::from(path)
    });
    let named = || std::env::var_os(MACHINE_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
    beside.filter(|path| path.exists()).or_else(named)
}

fn loaded() -> MutexGuard<'static, Option<Loaded>> {
    LOADED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_does_not_leave_the_library() {
        assert_eq!(answer(|| panic!("a bug")), nvml::nvmlReturn_enum_NVML_ERROR_UNKNOWN);
        assert_eq!(answer(|| Err(Refusal::InUse)), nvml::nvmlReturn_enum_NVML_ERROR_IN_USE);
        assert_eq!(answer(|| Ok(())), nvml::nvmlReturn_enum_NVML_SUCCESS);
    }
}
