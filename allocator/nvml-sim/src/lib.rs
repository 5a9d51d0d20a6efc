//! A `libnvidia-ml.so` that answers for a machine described in TOML.
//!
//! Who loads it by path and calls NVML sees the GPUs of the file that the variable `MLAD_NVML_SIM` names, can
//! divide them, and meets the rules, delays and faults of the real ones. All processes that name one file see
//! one machine. `docs/simulated-gpus.md` tells how to use it.
//!
//! * `facts` — GPU models, from `mig-profiles.json`.
//! * `geometry` — which instances can lie beside which: pure.
//! * `machine` — the description, in TOML.
//! * `state` — the machine as it is now and what can happen to it: pure.
//! * `store` — the state file, its lock.
//! * `driver` — state and store together: what NVML's calls come to.
//! * `events` — waiting for events.
//! * `ffi` — NVML's C functions. The only room with `unsafe`.

pub mod driver;
pub mod events;
pub mod facts;
mod ffi;
pub mod geometry;
pub mod machine;
pub mod refusal;
pub mod state;
pub mod store;

use std::path::{Path, PathBuf};

/// The library's file name, as Cargo builds it.
const LIBRARY: &str = "libnvidia_ml_sim.so";

/// What can go wrong with the simulation itself.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// The description of the machine.
    #[error("the machine file {}: {reason}", path.display())]
    Machine {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The state file.
    #[error("the state file {}: {reason}; if it is not to be kept, remove it", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

/// The library that Cargo built for this program or test: beside it, or among its dependencies.
#[must_use]
pub fn find_library() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let folder = program.parent()?;
    let folders = [Some(folder.to_owned()), Some(folder.join("deps")), folder.parent().map(Path::to_owned)];
    folders.into_iter().flatten().map(|folder| folder.join(LIBRARY)).find(|path| path.exists())
}
