//! One gateway's view of the world: what it is given as engine, allocator and observer.

use super::world::{Container, LEASE_SECONDS, State, World, resolve};
use crate::{
    runtime::{Found, FoundState, Runtime, RuntimeError, RuntimeEvent, StartProgress, WorkloadObserver, WorkloadSpec},
    workspace::{Clock as _, later},
};
use async_trait::async_trait;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use mlad::{
    api::{Gpu, GpuMap, Lease, Need, ProfileRoom, Wait},
    channel::JobResult,
};
use mlad_allocator::{Allocate, AllocatorError, LeaseRequest, LeaseState, Resolved};
use std::{sync::Arc, time::Duration};
use tokio::{net::UnixStream, sync::watch};
use tokio_stream::wrappers::BroadcastStream;

/// One gateway's view of the world: everything goes through here, until it crashes.
pub(crate) struct View {
    world: World,
    /// Calls, counted before and after, until the crash; for ever if negative.
    left: watch::Sender<i64>,
}

impl View {
    pub(crate) fn new(world: &World, crash_after: i64) -> Arc<Self> {
        Arc::new(Self { world: world.clone(), left: watch::Sender::new(crash_after) })
    }

    /// Returns when it has crashed.
    pub(crate) async fn crashed(&self) {
        let _ = self.left.subscribe().wait_for(|left| *left == 0).await;
    }

    /// From now on nothing of this gateway has any effect.
    pub(crate) fn crash(&self) {
        self.left.send_replace(0);
    }

    /// Goes on, unless the gateway has ended here.
    async fn pass(&self) {
        self.left.send_if_modified(|left| {
            *left = (*left - 1).max(if *left > 0 { 0 } else { *left });
            *left == 0
        });
        if *self.left.borrow() == 0 {
            std::future::pending::<()>().await;
        }
    }

    async fn call<T>(&self, name: &'static str, effect: impl FnOnce(&mut State) -> T) -> T {
        self.pass().await;
        self.world.0.calls.send_modify(|calls| *calls.entry(name).or_default() += 1);
        let _ = self.world.0.gates.subscribe().wait_for(|gates| !gates.contains(name)).await;
        // A gateway that crashed in the call has not made it.
        if *self.left.borrow() == 0 {
            std::future::pending::<()>().await;
        }
        let result = effect(&mut self.world.lock());
        self.pass().await;
        result
    }

    async fn engine<T>(
        &self,
        name: &'static str,
        effect: impl FnOnce(&mut State) -> Result<T, RuntimeError>,
    ) -> Result<T, RuntimeError> {
        self.call(name, |state| {
            if state.engine_up { effect(state) } else { Err(RuntimeError::Unavailable("connection refused".into())) }
        })
        .await
    }

    async fn allocator<T>(
        &self,
        name: &'static str,
        effect: impl FnOnce(&mut State) -> Result<T, AllocatorError>,
    ) -> Result<T, AllocatorError> {
        self.call(name, |state| {
            if !state.allocator_up {
                let (url, reason) = ("http://allocator".into(), "connection refused".into());
                return Err(AllocatorError::Unreachable { url, reason });
            }
            effect(state)
        })
        .await
    }

    fn changed(&self, workload: &str) {
        let _ = self.world.0.events.send(RuntimeEvent::Changed(workload.to_owned()));
    }
}

#[async_trait]
impl Runtime for View {
    async fn start(
        &self,
        spec: &WorkloadSpec,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<(), RuntimeError> {
        progress(StartProgress::Creating);
        assert!(!self.world.take_panic(), "the test wants a panic here");
        self.engine("create", |state| {
            if !state.failing_starts.is_empty() {
                return Err(state.failing_starts.remove(0));
            }
            if !state.containers.contains_key(&spec.name) {
                state.check_start(spec);
                let container = Container { spec: spec.clone(), state: FoundState::Created };
                state.containers.insert(spec.name.clone(), container);
            }
            Ok(())
        })
        .await?;
        progress(StartProgress::Connecting);
        self.engine("start", |state| {
            let container = state.containers.get_mut(&spec.name);
            let container = container.ok_or_else(|| RuntimeError::Gone(spec.name.clone()))?;
            if container.state == FoundState::Created {
                container.state = FoundState::Running;
            }
            Ok(())
        })
        .await?;
        self.changed(&spec.name);
        Ok(())
    }

    async fn remove(&self, name: &str, _: Duration) -> Result<(), RuntimeError> {
        let was = self.engine("remove", |state| Ok(state.containers.remove(name).is_some())).await?;
        if was {
            self.changed(name);
        }
        Ok(())
    }

    async fn terminate(&self, _: &str) -> Result<(), RuntimeError> {
        Ok(())
    }

    async fn list(&self) -> Result<Vec<Found>, RuntimeError> {
        self.engine("list", |state| Ok(state.containers.values().map(found).collect())).await
    }

    async fn inspect(&self, name: &str) -> Result<Option<Found>, RuntimeError> {
        self.engine("inspect", |state| Ok(state.containers.get(name).map(found))).await
    }

    async fn result(&self, _: &str) -> Result<Option<JobResult>, RuntimeError> {
        Ok(None)
    }

    fn events(&self) -> BoxStream<'static, RuntimeEvent> {
        let news = BroadcastStream::new(self.world.0.events.subscribe());
        let news = news.map(|event| event.unwrap_or(RuntimeEvent::Resync));
        let up = self.world.lock().engine_up;
        stream::iter(up.then_some(RuntimeEvent::Resync)).chain(news).boxed()
    }

    async fn connect(&self, name: &str) -> Result<UnixStream, RuntimeError> {
        let runs = self.call("connect", |state| state.containers.contains_key(name)).await;
        if !runs {
            return Err(RuntimeError::Gone(name.to_owned()));
        }
        Ok(UnixStream::pair().unwrap().0)
    }

    async fn resolve_image(
        &self,
        reference: &str,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<String, RuntimeError> {
        let present = self.image_present(reference).await?;
        if let Some(pinned) = present {
            return Ok(pinned);
        }
        progress(StartProgress::Pulling(1 << 20, Some(4 << 20)));
        self.engine("pull", |state| {
            let image = state.registry.get(reference).copied();
            let reason = "no registry has it".to_owned();
            let image = image.ok_or_else(|| RuntimeError::Image { image: reference.to_owned(), reason })?;
            state.images.insert(image);
            Ok(format!("sha256:{image}"))
        })
        .await
    }

    async fn image_present(&self, reference: &str) -> Result<Option<String>, RuntimeError> {
        self.engine("image", |state| Ok(state.images.get(reference).map(|image| format!("sha256:{image}")))).await
    }
}

fn found(container: &Container) -> Found {
    Found { name: container.spec.name.clone(), fence: container.spec.fence, state: container.state.clone() }
}

#[async_trait]
impl Allocate for View {
    async fn resolve(&self, need: &Need) -> Result<Resolved, AllocatorError> {
        self.allocator("resolve", |_| resolve(need)).await
    }

    async fn request(&self, request: &LeaseRequest) -> Result<LeaseState, AllocatorError> {
        let now = self.world.0.clock.now();
        let state = self
            .allocator("request", |state| {
                resolve(&request.need)?;
                match state.state_of(&request.workload) {
                    Some(LeaseState::Ended { .. }) => return Err(AllocatorError::Ended(request.workload.clone())),
                    Some(known) => return Ok(known),
                    None => {}
                }
                state.queue.push((request.clone(), now));
                state.grant(now);
                Ok(state.state_of(&request.workload).unwrap())
            })
            .await?;
        self.world.bump();
        Ok(state)
    }

    async fn state(&self, workload: &str) -> Result<LeaseState, AllocatorError> {
        let unknown = || AllocatorError::Unknown(workload.to_owned());
        self.allocator("state", |state| state.state_of(workload).ok_or_else(unknown)).await
    }

    async fn renew(&self, workload: &str, fence: u64) -> Result<Lease, AllocatorError> {
        let expires = later(self.world.0.clock.now(), Duration::from_secs(LEASE_SECONDS));
        self.allocator("renew", |state| {
            let lease = state.leases.get_mut(workload).ok_or_else(|| AllocatorError::Ended(workload.to_owned()))?;
            if lease.fence != fence {
                return Err(AllocatorError::Fence(workload.to_owned()));
            }
            if lease.over.is_some() {
                return Err(AllocatorError::Ended(workload.to_owned()));
            }
            lease.expires_at = expires;
            Ok(lease.clone())
        })
        .await
    }

    async fn release(&self, workload: &str) -> Result<(), AllocatorError> {
        self.allocator("release", |state| {
            state.check_release(workload);
            state.end(workload, "released");
            Ok(())
        })
        .await?;
        self.world.bump();
        Ok(())
    }

    async fn revoke(&self, workload: &str, reason: &str, _: bool) -> Result<(), AllocatorError> {
        self.allocator("revoke", |state| {
            state.revoke(workload, reason);
            Ok(())
        })
        .await?;
        self.world.bump();
        Ok(())
    }

    async fn leases(&self) -> Result<Vec<Lease>, AllocatorError> {
        self.allocator("leases", |state| Ok(state.leases.values().cloned().collect())).await
    }

    async fn waits(&self) -> Result<Vec<Wait>, AllocatorError> {
        self.allocator("waits", |state| Ok(state.waits())).await
    }

    async fn map(&self) -> Result<GpuMap, AllocatorError> {
        let as_of = self.world.0.clock.now();
        self.allocator("map", |state| {
            let most = u32::try_from(state.slots.len()).unwrap();
            let free = u32::try_from(state.slots.iter().filter(|slot| slot.is_none()).count()).unwrap();
            let room = |profile: &str, memory_mib| ProfileRoom { profile: profile.into(), memory_mib, free, most };
            let gpu = Gpu {
                node: "here".into(),
                index: 0,
                uuid: "GPU-0".into(),
                model: "A100".into(),
                memory_mib: 40960,
                mig: true,
                columns: 8,
                slices: Vec::new(),
                profiles: vec![room("1g.5gb", 4864), room("2g.10gb", 9856), room("3g.20gb", 19968)],
                read_at: None,
                fault: None,
            };
            Ok(GpuMap { gpus: vec![gpu], as_of, late: None })
        })
        .await
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
        let mut version = self.world.0.version.subscribe();
        let version = *version.wait_for(|version| *version > seen).await.unwrap();
        self.allocator("changed", |_| Ok(version)).await
    }
}

impl WorkloadObserver for View {
    fn running(&self, workload: &str, user: &str) {
        self.world.lock().observed.insert(workload.to_owned(), user.to_owned());
    }

    fn gone(&self, workload: &str) {
        self.world.lock().observed.remove(workload);
    }
}
