//! A simulated machine of a test's own.

use mlad_allocator::{Gpus, Settings};
use nvidia_ml_sim::{
    driver::Driver,
    machine::Machine as Description,
    state::{Fault, FaultKind, State},
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tempfile::TempDir;

/// A simulated machine with its files, and the allocator's database beside them.
pub(crate) struct Machine {
    folder: TempDir,
}

impl Machine {
    /// So many GPUs of a model, in MIG mode.
    pub(crate) fn new(model: &str, count: u32) -> Self {
        Self::described(&format!("[[gpu]]\nmodel = \"{model}\"\ncount = {count}\nmig = true\n"))
    }

    /// The machine of a description.
    pub(crate) fn described(toml: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let library = nvidia_ml_sim::find_library().expect("cargo builds libnvidia_ml_sim.so for these tests");
        // A copy of its own: a program that loads two paths sees two machines.
        std::fs::copy(library, folder.path().join("libnvidia-ml.so")).unwrap();
        std::fs::write(folder.path().join("libnvidia-ml.so.toml"), toml).unwrap();
        Self { folder }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn library(&self) -> PathBuf {
        self.path().join("libnvidia-ml.so")
    }

    pub(crate) fn database(&self) -> PathBuf {
        self.path().join("allocator.db")
    }

    pub(crate) fn settings(&self) -> Settings {
        Settings { gpus: Gpus::Library(self.library()), ..Settings::new(self.database(), "node-1") }
    }

    /// The machine as it is now.
    pub(crate) fn state(&self) -> Arc<State> {
        self.driver().state().unwrap()
    }

    /// Makes something happen on the machine.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        self.driver().change(|state| Ok(change(state))).unwrap()
    }

    /// Lays a fault.
    pub(crate) fn fault(&self, kind: FaultKind, gpu: u32, times: u32, milliseconds: Option<u64>) {
        self.change(|state| state.lay(Fault { kind, gpu: Some(gpu), on: None, times: Some(times), milliseconds }));
    }

    /// UUIDs of all slices there are, by GPU.
    pub(crate) fn slices(&self) -> Vec<(u32, String)> {
        let state = self.state();
        let of = |(index, gpu): (usize, &nvidia_ml_sim::state::Gpu)| -> Vec<(u32, String)> {
            gpu.mig_devices().map(|(_, compute)| (index as u32, compute.uuid.clone())).collect()
        };
        state.gpus.iter().enumerate().flat_map(of).collect()
    }

    fn driver(&self) -> Driver {
        let description = Description::load(&self.path().join("libnvidia-ml.so.toml")).unwrap();
        Driver::start(description).unwrap()
    }
}
