//! One gateway's view of the engine.

use super::{CrashPoint, World, world::Container};
use crate::runtime::{Found, FoundState, Runtime, RuntimeError, RuntimeEvent, StartProgress, WorkloadSpec};
use async_trait::async_trait;
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use mlad::channel::{Exit, JobResult};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio_stream::wrappers::{BroadcastStream, errors::BroadcastStreamRecvError};

/// The engine as one gateway sees it.
pub(crate) struct FakeRuntime {
    world: World,
    crash: CrashPoint,
}

impl FakeRuntime {
    pub(crate) fn new(world: &World, crash: &CrashPoint) -> Self {
        Self { world: world.clone(), crash: crash.clone() }
    }

    async fn call<T>(&self, effect: impl FnOnce(&World) -> Result<T, RuntimeError>) -> Result<T, RuntimeError> {
        self.crash.pass().await;
        let engine = self.world.lock().engine.clone();
        let result = engine.and_then(|()| effect(&self.world));
        self.crash.pass().await;
        result
    }
}

#[async_trait]
impl Runtime for FakeRuntime {
    async fn start(&self, spec: &WorkloadSpec, _: &(dyn Fn(StartProgress) + Send + Sync)) -> Result<(), RuntimeError> {
        self.call(|world| {
            let mut inner = world.lock();
            if !inner.failing_starts.is_empty() {
                return Err(inner.failing_starts.remove(0));
            }
            if !inner.containers.contains_key(&spec.name) {
                let container =
                    Container { spec: spec.clone(), state: FoundState::Created, result: None, terminated: 0 };
                inner.containers.insert(spec.name.clone(), container);
            }
            Ok(())
        })
        .await?;
        // A gateway may die between the two.
        self.call(|world| {
            let mut inner = world.lock();
            if inner.containers.get(&spec.name).is_some_and(|container| container.state == FoundState::Created) {
                inner.start_process(&spec.name);
            }
            drop(inner);
            world.changed(&spec.name);
            Ok(())
        })
        .await
    }

    async fn remove(&self, name: &str, _: Duration) -> Result<(), RuntimeError> {
        self.call(|world| {
            world.lock().containers.remove(name);
            world.changed(name);
            Ok(())
        })
        .await
    }

    async fn terminate(&self, name: &str) -> Result<(), RuntimeError> {
        self.call(|world| {
            let mut inner = world.lock();
            let stubborn = inner.stubborn;
            if let Some(container) = inner.containers.get_mut(name) {
                container.terminated += 1;
            }
            drop(inner);
            if !stubborn {
                let exit = Exit::Signal { name: "TERM".into(), core_dumped: false, message: String::new() };
                world.end(name, exit, false);
            }
            Ok(())
        })
        .await
    }

    async fn list(&self) -> Result<Vec<Found>, RuntimeError> {
        self.call(|world| Ok(world.lock().containers.values().map(found).collect())).await
    }

    async fn inspect(&self, name: &str) -> Result<Option<Found>, RuntimeError> {
        self.call(|world| Ok(world.lock().containers.get(name).map(found))).await
    }

    async fn result(&self, name: &str) -> Result<Option<JobResult>, RuntimeError> {
        self.call(|world| Ok(world.lock().containers.get(name).and_then(|container| container.result.clone()))).await
    }

    fn events(&self) -> BoxStream<'static, RuntimeEvent> {
        let news = BroadcastStream::new(self.world.events.subscribe()).map(|event| match event {
            Ok(event) => event,
            Err(BroadcastStreamRecvError::Lagged(_)) => RuntimeEvent::Resync,
        });
        stream::once(async { RuntimeEvent::Resync }).chain(news).boxed()
    }

    async fn connect(&self, name: &str) -> Result<UnixStream, RuntimeError> {
        Err(RuntimeError::Gone(name.into()))
    }

    async fn resolve_image(
        &self,
        reference: &str,
        _: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<String, RuntimeError> {
        self.call(|world| {
            if world.lock().images.contains(reference) {
                return Ok(format!("sha256:{reference}"));
            }
            Err(RuntimeError::Image { image: reference.into(), reason: "no registry has it".into() })
        })
        .await
    }

    async fn image_present(&self, reference: &str) -> Result<Option<String>, RuntimeError> {
        self.call(|world| Ok(world.lock().images.get(reference).map(|image| format!("sha256:{image}")))).await
    }
}

fn found(container: &Container) -> Found {
    Found { name: container.spec.name.clone(), fence: container.spec.fence, state: container.state.clone() }
}
