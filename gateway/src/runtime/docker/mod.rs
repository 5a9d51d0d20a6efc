//! Docker 20.10 and later, over its local socket.
//!
//! * [`lifecycle`] — a container made, started, reached, ended, removed.
//! * [`container`] — what a container is to be, in the engine's words; pure.
//! * [`cdi`] — specifications that name the slices a container is to get.
//! * [`run_folder`], [`agent`] — what gateway and container share, and reaching the agent through it.
//! * [`network`], [`firewall`] — a bridge on which containers reach the outside and nothing else.
//! * [`events`], [`image`] — news, and images.
//! * [`engine`] — the connection, its deadlines and errors.

mod agent;
mod cdi;
mod container;
mod engine;
mod events;
mod firewall;
mod image;
mod lifecycle;
mod network;
mod run_folder;

use super::{
    Found, FoundState, Runtime, RuntimeError, RuntimeEvent, StartProgress, WorkloadSpec, check_name,
    turns::Turns,
    workload::{LABEL_INSTANCE, LABEL_WORKLOAD},
};
use crate::config::{Config, Firewall as FirewallPolicy};
use async_trait::async_trait;
use bollard::{
    models::{ContainerSummary, ContainerSummaryStateEnum as State},
    query_parameters::ListContainersOptionsBuilder,
};
use cdi::Cdi;
use engine::{Engine, QUESTION};
use firewall::Firewall;
use futures::stream::{BoxStream, StreamExt as _, TryStreamExt as _};
use mlad::channel::JobResult;
use network::Network;
use run_folder::RunFolders;
use std::{
    collections::{BTreeSet, HashMap},
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::net::UnixStream;

/// Questions to the engine at once, where there is one per container.
const QUESTIONS: usize = 16;

/// A container engine that speaks Docker's API.
#[derive(Debug)]
pub struct Docker {
    config: Arc<Config>,
    engine: Arc<Engine>,
    firewall: Firewall,
    network: Network,
    cdi: Cdi,
    folders: RunFolders,
    /// One start of a workload at a time.
    turns: Turns,
    /// One request that makes, starts or removes it at a time.
    changes: Turns,
    /// Whether what an earlier process left in the run folders was cleared away.
    swept: AtomicBool,
}

impl Docker {
    /// Prepares host and engine. An engine that does not answer now is no error: everything that needs it
    /// says [`RuntimeError::Unavailable`] until it does.
    ///
    /// # Errors
    /// [`RuntimeError::Host`] when the agent's binary is absent, the run directory cannot be made, or the
    /// firewall rules cannot be put in place.
    pub async fn connect(config: &Config) -> Result<Self, RuntimeError> {
        if !config.agent_binary.is_file() {
            return Err(RuntimeError::Host(format!(
                "agent_binary: {} is not there; build the static mlad (scripts/quickstart shows how)",
                config.agent_binary.display()
            )));
        }
        let root = config.run_directory.join("workloads");
        let folders = RunFolders::open(root.clone())
            .map_err(|error| RuntimeError::Host(format!("run_directory: {}: {error}", root.display())))?;
        let network = Network::new(config)?;
        let docker = Self {
            config: Arc::new(config.clone()),
            engine: Arc::new(Engine::new(&config.docker.socket)),
            firewall: Firewall::new(config, network.bridge()),
            network,
            cdi: Cdi::new(&config.container),
            folders,
            turns: Turns::default(),
            changes: Turns::default(),
            swept: AtomicBool::new(false),
        };
        if config.docker.firewall == FirewallPolicy::None {
            tracing::warn!("docker.firewall is \"none\": nothing of ours keeps containers from this host");
        }
        docker.firewall.apply(&network::name_servers(config)).await?;
        if docker.engine.client().await.is_ok()
            && let Err(error) = docker.network.ensure(&docker.engine).await
        {
            // What runs goes on; each start says it again.
            tracing::error!(%error, "no container can be started");
        }
        Ok(docker)
    }

    /// Removes everything of this instance from the host: containers, network, firewall rules.
    ///
    /// # Errors
    /// When the engine does not answer or a rule cannot be removed.
    pub async fn uninstall(&self) -> Result<(), RuntimeError> {
        let removals =
            self.list().await?.into_iter().map(|found| async move { self.remove(&found.name, Duration::ZERO).await });
        futures::stream::iter(removals).buffer_unordered(QUESTIONS).try_collect::<()>().await?;
        self.network.remove(&self.engine).await?;
        self.firewall.remove().await
    }

    /// One container of a list. Only an ended one needs a second question: a list says nothing of memory.
    async fn listed(&self, summary: ContainerSummary) -> Result<Option<Found>, RuntimeError> {
        let Some(name) = summary.labels.as_ref().and_then(|labels| labels.get(LABEL_WORKLOAD)).cloned() else {
            return Ok(None);
        };
        let own = format!("/{}", self.container_name(&name));
        let fence = summary.labels.as_ref().and_then(|labels| self.fence(&name, labels));
        let (Some(fence), true) = (fence, summary.names.unwrap_or_default().contains(&own)) else {
            return Ok(None);
        };
        let state = match summary.state {
            Some(State::CREATED) => FoundState::Created,
            Some(State::RUNNING | State::PAUSED | State::RESTARTING | State::STOPPING) => FoundState::Running,
            _ => return self.look(&name).await,
        };
        Ok(Some(Found { name, fence, state }))
    }

    /// Clears away what an earlier process left when it was killed.
    async fn sweep(&self, listed: &BTreeSet<&str>) -> io::Result<()> {
        let folders = self.folders.clone();
        let names = lifecycle::blocking(move || folders.leftovers()).await?;
        for name in names.into_iter().filter(|name| !listed.contains(name.as_str())) {
            // A start may have begun meanwhile: its turn, and another look, tell.
            let _turn = self.turns.take(&name).await;
            if matches!(self.look(&name).await, Ok(None)) {
                let folders = self.folders.clone();
                lifecycle::blocking(move || folders.remove(&name)).await?;
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Runtime for Docker {
    async fn start(
        &self,
        spec: &WorkloadSpec,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<(), RuntimeError> {
        self.start_workload(spec, progress).await
    }

    async fn remove(&self, name: &str, grace: Duration) -> Result<(), RuntimeError> {
        self.remove_workload(name, grace).await
    }

    async fn terminate(&self, name: &str) -> Result<(), RuntimeError> {
        self.terminate_workload(name).await
    }

    async fn list(&self) -> Result<Vec<Found>, RuntimeError> {
        let filters = HashMap::from([("label", vec![format!("{LABEL_INSTANCE}={}", self.config.instance)])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let question = |client: bollard::Docker| async move { client.list_containers(Some(options)).await };
        let summaries = self.engine.call(QUESTION, question).await?;
        let found = futures::stream::iter(summaries).map(|summary| self.listed(summary)).buffered(QUESTIONS);
        let found: Vec<Found> = found.try_filter_map(|found| async { Ok(found) }).try_collect().await?;
        if !self.swept.swap(true, Ordering::Relaxed) {
            let names = found.iter().map(|found| found.name.as_str()).collect();
            if let Err(error) = self.sweep(&names).await {
                tracing::warn!(%error, "run folders of an earlier process cannot be cleared away");
            }
        }
        Ok(found)
    }

    async fn inspect(&self, name: &str) -> Result<Option<Found>, RuntimeError> {
        self.look(name).await
    }

    async fn result(&self, name: &str) -> Result<Option<JobResult>, RuntimeError> {
        check_name(name)?;
        let folder = match self.folders.find(name) {
            Ok(folder) => folder,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(RuntimeError::Host(format!("the run folder of {name}: {error}"))),
        };
        folder.result().map_err(|error| RuntimeError::Host(format!("the result of {name}: {error}")))
    }

    fn events(&self) -> BoxStream<'static, RuntimeEvent> {
        events::events(Arc::clone(&self.engine), self.config.instance.clone())
    }

    async fn connect(&self, name: &str) -> Result<UnixStream, RuntimeError> {
        check_name(name)?;
        let result = match self.folders.find(name) {
            Ok(folder) => agent::connect(&folder).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(stream) => Ok(stream),
            Err(error) => match self.look(name).await? {
                Some(Found { state: FoundState::Running, .. }) => Err(lifecycle::no_agent(name, &error)),
                _ => Err(RuntimeError::Gone(name.to_owned())),
            },
        }
    }

    async fn resolve_image(
        &self,
        reference: &str,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<String, RuntimeError> {
        image::resolve(&self.engine, reference, progress).await
    }

    async fn image_present(&self, reference: &str) -> Result<Option<String>, RuntimeError> {
        image::present(&self.engine, reference).await
    }
}
