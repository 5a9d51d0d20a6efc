//! A world for tests of the controllers: an engine with containers and a machine with slices that outlive
//! the gateway, and ways to break either, or to end the gateway between any two of its calls.
//!
//! [`World`] holds what is true whatever the gateway does, and writes down what must never happen
//! ([`World::violations`]). [`FakeRuntime`] and [`FakeAllocator`] are one gateway's view of it.

mod allocator;
mod crash;
mod runtime;
mod world;

pub(crate) use allocator::FakeAllocator;
pub(crate) use crash::CrashPoint;
pub(crate) use runtime::FakeRuntime;
pub(crate) use world::World;

use crate::{config::Config, runtime::WorkloadObserver, store::Store};
use std::{collections::BTreeMap, path::Path, sync::Arc};
use tokio::sync::watch;

/// Settings with their data in `folder` and a catalog with the images `base` (the default) and `torch`, which
/// needs 8000 MiB.
pub(crate) fn config(folder: &Path) -> Config {
    let catalog = folder.join("catalog.toml");
    std::fs::write(
        &catalog,
        "[[image]]\nname = 'base'\nreference = 'mlad/base:1'\ndescription = 'base'\n\
         [[image]]\nname = 'torch'\nreference = 'mlad/torch:1'\ndescription = 'torch'\nmin_gpu_memory_mib = 8000\n",
    )
    .unwrap();
    let folder = folder.display();
    toml::from_str(&format!(
        "data_directory = '{folder}'\nrun_directory = '{folder}/run'\nagent_binary = '/x'\n\
         catalog = '{folder}/catalog.toml'\n\
         [workspace]\ndefault_image = 'base'\n[job]\nretry_seconds = 0\ngrace_seconds = 1\n"
    ))
    .unwrap()
}

/// The database in `folder`; the same one if it is there.
pub(crate) async fn store(folder: &Path) -> Store {
    Store::open(&folder.join("gateway.db")).await.unwrap()
}

/// An observer that remembers which workloads run.
#[derive(Default)]
pub(crate) struct Observed(watch::Sender<BTreeMap<String, String>>);

impl Observed {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The workloads that run, and whose they are.
    pub(crate) fn now(&self) -> BTreeMap<String, String> {
        self.0.borrow().clone()
    }

    /// Waits until some workload runs.
    pub(crate) async fn some(&self) {
        self.0.subscribe().wait_for(|workloads| !workloads.is_empty()).await.unwrap();
    }
}

impl WorkloadObserver for Observed {
    fn running(&self, workload: &str, user: &str) {
        self.0.send_modify(|workloads| drop(workloads.insert(workload.into(), user.into())));
    }

    fn gone(&self, workload: &str) {
        self.0.send_modify(|workloads| drop(workloads.remove(workload)));
    }
}
