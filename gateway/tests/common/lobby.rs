//! The real login room before a real controller of workspaces: on an engine whose every container is the one agent
//! of the test, and a machine without GPUs.

use async_trait::async_trait;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use jiff::{Timestamp, ToSpan as _};
use mlad::{
    api::{GpuMap, Lease, Need, Wait},
    channel::JobResult,
};
use mlad_allocator::{Allocate, AllocatorError, LeaseRequest, LeaseState, Resolved};
use mlad_gateway::{
    config::Config,
    image::Catalog,
    runtime::{Found, FoundState, Runtime, RuntimeError, RuntimeEvent, StartProgress, WorkloadObserver, WorkloadSpec},
    store::Store,
    workspace::Workspaces,
};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{net::UnixStream, sync::watch};

const CATALOG: &str = "[[image]]\nname = 'base'\nreference = 'test/base:1'\ndescription = 'Debian'\n\
                       [[image]]\nname = 'torch'\nreference = 'test/torch:1'\ndescription = 'PyTorch'\n";

/// The room.
pub struct Lobby {
    pub workspaces: Workspaces,
    /// Whether containers may start; they wait until they may.
    pub open: watch::Sender<bool>,
}

impl Lobby {
    pub(super) async fn open(folder: &Path, store: &Store, agent: PathBuf) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        let path = folder.display();
        let config: Config = toml::from_str(&format!(
            "data_directory = '{path}'\nrun_directory = '{path}/run'\nagent_binary = '/x'\n\
             catalog = '{path}/catalog.toml'\n[workspace]\ndefault_need = 'cpu'\n"
        ))
        .unwrap();
        std::fs::write(&config.catalog, CATALOG).unwrap();
        let open = watch::Sender::new(true);
        let house =
            Arc::new(House { agent, open: open.clone(), containers: Mutex::default(), leases: Mutex::default() });
        let catalog = Arc::new(Catalog::load(&config, store.clone()).unwrap());
        let config = Arc::new(config);
        let started =
            Workspaces::start(config, store.clone(), house.clone() as _, house.clone() as _, catalog, house as _);
        Self { workspaces: started.await.unwrap(), open }
    }
}

/// Engine, allocator and observer.
struct House {
    agent: PathBuf,
    open: watch::Sender<bool>,
    containers: Mutex<BTreeMap<String, u64>>,
    leases: Mutex<BTreeMap<String, Lease>>,
}

impl House {
    fn lease(&self, workload: &str) -> Result<Lease, AllocatorError> {
        let leases = self.leases.lock().unwrap();
        leases.get(workload).cloned().ok_or_else(|| AllocatorError::Unknown(workload.into()))
    }
}

#[async_trait]
impl Runtime for House {
    async fn start(&self, spec: &WorkloadSpec, _: &(dyn Fn(StartProgress) + Send + Sync)) -> Result<(), RuntimeError> {
        self.open.subscribe().wait_for(|open| *open).await.unwrap();
        self.containers.lock().unwrap().insert(spec.name.clone(), spec.fence);
        Ok(())
    }

    async fn remove(&self, name: &str, _: Duration) -> Result<(), RuntimeError> {
        self.containers.lock().unwrap().remove(name);
        Ok(())
    }

    async fn terminate(&self, _: &str) -> Result<(), RuntimeError> {
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Found>, RuntimeError> {
        let found =
            |(name, fence): (&String, &u64)| Found { name: name.clone(), fence: *fence, state: FoundState::Running };
        Ok(self.containers.lock().unwrap().iter().map(found).collect())
    }

    async fn inspect(&self, name: &str) -> Result<Option<Found>, RuntimeError> {
        Ok(self.list().await?.into_iter().find(|found| found.name == name))
    }

    async fn result(&self, _: &str) -> Result<Option<JobResult>, RuntimeError> {
        Ok(None)
    }

    fn events(&self) -> BoxStream<'static, RuntimeEvent> {
        stream::once(async { RuntimeEvent::Resync }).chain(stream::pending()).boxed()
    }

    async fn connect(&self, _: &str) -> Result<UnixStream, RuntimeError> {
        UnixStream::connect(&self.agent).await.map_err(|error| RuntimeError::Gone(error.to_string()))
    }

    async fn resolve_image(
        &self,
        reference: &str,
        _: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<String, RuntimeError> {
        Ok(reference.into())
    }

    async fn image_present(&self, reference: &str) -> Result<Option<String>, RuntimeError> {
        Ok(Some(reference.into()))
    }
}

impl WorkloadObserver for House {
    fn running(&self, _: &str, _: &str) {}

    fn gone(&self, _: &str) {}
}

#[async_trait]
impl Allocate for House {
    async fn resolve(&self, _: &Need) -> Result<Resolved, AllocatorError> {
        Ok(Resolved { profile: "cpu".into(), memory_mib: 0 })
    }

    async fn request(&self, request: &LeaseRequest) -> Result<LeaseState, AllocatorError> {
        let mut leases = self.leases.lock().unwrap();
        let fence = leases.len() as u64 + 1;
        let lease = leases.entry(request.workload.clone()).or_insert_with(|| Lease {
            workload: request.workload.clone(),
            user: request.user.clone(),
            fence,
            node: "here".into(),
            need: request.need.clone(),
            profile: "cpu".into(),
            uuids: Vec::new(),
            memory_mib: 0,
            slices: Vec::new(),
            project: None,
            priority: 0,
            preemptible: false,
            expected_end: None,
            ending: None,
            trouble: None,
            granted_at: Timestamp::now(),
            expires_at: Timestamp::now() + 1.hour(),
            over: None,
        });
        Ok(LeaseState::Granted(lease.clone()))
    }

    async fn state(&self, workload: &str) -> Result<LeaseState, AllocatorError> {
        self.lease(workload).map(LeaseState::Granted)
    }

    async fn renew(&self, workload: &str, _: u64) -> Result<Lease, AllocatorError> {
        self.lease(workload)
    }

    async fn release(&self, workload: &str) -> Result<(), AllocatorError> {
        self.leases.lock().unwrap().remove(workload);
        Ok(())
    }

    async fn revoke(&self, workload: &str, _: &str, _: bool) -> Result<(), AllocatorError> {
        self.release(workload).await
    }

    async fn leases(&self) -> Result<Vec<Lease>, AllocatorError> {
        Ok(self.leases.lock().unwrap().values().cloned().collect())
    }

    async fn waits(&self) -> Result<Vec<Wait>, AllocatorError> {
        Ok(Vec::new())
    }

    async fn map(&self) -> Result<GpuMap, AllocatorError> {
        Ok(GpuMap { gpus: Vec::new(), as_of: Timestamp::now(), late: None })
    }

    async fn nodes(&self) -> Result<Vec<mlad::api::NodeInfo>, AllocatorError> {
        Ok(Vec::new())
    }

    async fn forget_node(&self, node: &str) -> Result<(), AllocatorError> {
        Err(AllocatorError::Unknown(node.to_owned()))
    }

    async fn trust_gpu(&self, gpu: &str) -> Result<(), AllocatorError> {
        Err(AllocatorError::Unknown(gpu.to_owned()))
    }

    async fn past(&self, at: jiff::Timestamp) -> Result<mlad::api::Past, AllocatorError> {
        Ok(mlad::api::Past { at, incomplete: false, leases: Vec::new() })
    }

    async fn usage(
        &self,
        from: jiff::civil::Date,
        to: jiff::civil::Date,
    ) -> Result<mlad::api::UsageList, AllocatorError> {
        Ok(mlad::api::UsageList { from, to, kept_since: from, usage: Vec::new() })
    }

    async fn set_accounts(&self, _: &[mlad_allocator::Account]) -> Result<(), AllocatorError> {
        Ok(())
    }

    async fn accounts(&self) -> Result<Vec<mlad_allocator::AccountState>, AllocatorError> {
        Ok(Vec::new())
    }

    async fn reserve(&self, _: &mlad::api::NewReservation) -> Result<mlad::api::Reservation, AllocatorError> {
        Err(AllocatorError::Reservation("nothing can be reserved here".into()))
    }

    async fn cancel_reservation(&self, _: &str) -> Result<(), AllocatorError> {
        Ok(())
    }

    async fn reservations(&self) -> Result<Vec<mlad::api::Reservation>, AllocatorError> {
        Ok(Vec::new())
    }

    async fn changed(&self, seen: u64) -> Result<u64, AllocatorError> {
        // Nothing here is waited for by way of the news.
        if seen == 0 { Ok(1) } else { std::future::pending().await }
    }
}
