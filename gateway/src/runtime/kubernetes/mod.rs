//! Pods of a Kubernetes cluster.
//!
//! * [`lifecycle`] — a pod made, reached, ended, removed.
//! * [`pod`] — what a pod is to be, in the cluster's words; pure. [`standing`] — what its status says; pure.
//! * [`authority`] — certificates, so that gateway and agent know each other across the cluster's network.
//!
//! The cluster's own word counts: a pod is gone when the API server has no object of its name any more, which it
//! removes when the pod's node has confirmed that its containers ended. A node that is cut off confirms nothing, and so
//! its pods count as running until an administrator says that it is no more (`kubectl delete node`).

mod authority;
mod lifecycle;
mod pod;
mod standing;

use super::{
    Found, Runtime, RuntimeError, RuntimeEvent, StartProgress, WorkloadSpec, turns::Turns, workload::LABEL_INSTANCE,
};
use crate::config::{Config, Kubernetes as Settings};
use async_trait::async_trait;
use authority::Authority;
use futures::{StreamExt as _, stream::BoxStream};
use k8s_openapi::api::core::v1::{Event, Node, Pod, Secret};
use kube::{
    Api, Client,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{WatchStreamExt as _, watcher},
};
use mlad::channel::JobResult;
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{net::UnixStream, time::Instant};

/// Longest wait for an answer of the API server.
const QUESTION: Duration = Duration::from_secs(15);
/// How long whoever wants something started waits for the API server, and between two tries.
const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_secs(2);
/// How long what the nodes say of their images is good.
const IMAGES_STAY: Duration = Duration::from_secs(3);
/// Pods asked for at once in a list.
const PAGE: u32 = 500;

/// The names of each image of each node.
type ImageNames = Arc<Vec<Vec<String>>>;

/// A cluster whose pods are the containers.
#[derive(Clone)]
pub struct Kubernetes {
    config: Arc<Config>,
    settings: Arc<Settings>,
    pods: Api<Pod>,
    secrets: Api<Secret>,
    events: Api<Event>,
    nodes: Api<Node>,
    authority: Arc<Authority>,
    /// Where the agents of running workloads were last reached. A pod keeps its address to its end, and its
    /// certificate tells it from another that has the address later.
    addresses: Arc<Mutex<HashMap<String, SocketAddr>>>,
    /// One start or removal of a workload at a time.
    turns: Arc<Turns>,
    /// The names of the images that nodes have, and when they were asked.
    images: Arc<tokio::sync::Mutex<Option<(Instant, ImageNames)>>>,
}

impl Kubernetes {
    /// Connects.
    ///
    /// # Errors
    /// [`RuntimeError::Host`] when the kubeconfig cannot be used or the authority of the agents is broken;
    /// [`RuntimeError::Unavailable`] when the API server does not answer.
    pub async fn connect(config: &Config, settings: &Settings) -> Result<Self, RuntimeError> {
        let client = client(settings).await?;
        let namespace = settings.namespace.as_str();
        let secrets = Api::namespaced(client.clone(), namespace);
        // The cluster may be started together with the gateway.
        let patience = Patience::begin();
        let mut authority = Authority::of(&secrets, &config.instance).await;
        while patience.again(&authority).await {
            authority = Authority::of(&secrets, &config.instance).await;
        }
        Ok(Self {
            authority: Arc::new(authority?),
            config: Arc::new(config.clone()),
            settings: Arc::new(settings.clone()),
            pods: Api::namespaced(client.clone(), namespace),
            events: Api::namespaced(client.clone(), namespace),
            nodes: Api::all(client),
            secrets,
            addresses: Arc::default(),
            turns: Arc::default(),
            images: Arc::default(),
        })
    }

    fn selector(&self) -> String {
        format!("{}={}", LABEL_INSTANCE, self.config.instance)
    }

    /// Every pod of this instance.
    async fn all(&self) -> Result<Vec<Pod>, RuntimeError> {
        let mut pods = Vec::new();
        let mut page = ListParams::default().labels(&self.selector()).limit(PAGE);
        loop {
            let list = answered(self.pods.list(&page)).await?;
            pods.extend(list.items);
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page = page.continue_token(&token),
                None => return Ok(pods),
            }
        }
    }

    /// The reference, by digest, under which a node has an image. What the nodes say is asked for at most every few
    /// seconds, however many ask: of a large cluster it is a lot.
    async fn on_a_node(&self, reference: &str) -> Result<Option<String>, RuntimeError> {
        let mut known = self.images.lock().await;
        let fresh = known.as_ref().filter(|(asked, _)| asked.elapsed() < IMAGES_STAY);
        let names = match fresh {
            Some((_, names)) => Arc::clone(names),
            None => {
                // From the API server's cache: it need not be the very latest.
                let nodes = answered(self.nodes.list(&ListParams::default().match_any())).await?;
                let images = nodes.items.into_iter().filter_map(|node| node.status?.images).flatten();
                let names = Arc::new(images.filter_map(|image| image.names).collect::<Vec<_>>());
                *known = Some((Instant::now(), Arc::clone(&names)));
                names
            }
        };
        Ok(names.iter().find_map(|names| pinned(names, reference)))
    }
}

/// How often something that can be repeated is done again while the API server does not answer: it is restarted, or on
/// its way to another machine, and people would rather wait than come again.
struct Patience(Instant);

impl Patience {
    fn begin() -> Self {
        Self(Instant::now())
    }

    /// Whether to try again after this result; if so, after a pause.
    async fn again<T: Sync>(&self, result: &Result<T, RuntimeError>) -> bool {
        let Err(RuntimeError::Unavailable(reason)) = result else { return false };
        if self.0.elapsed() > PATIENCE {
            return false;
        }
        tracing::warn!(reason, "the cluster does not answer now; trying again");
        tokio::time::sleep(PAUSE).await;
        true
    }
}

/// The name by digest among an image's names, if one of them is the reference; nodes write names out in full.
fn pinned(names: &[String], reference: &str) -> Option<String> {
    let tagged = if reference.rsplit('/').next().is_some_and(|last| last.contains([':', '@'])) {
        reference.to_owned()
    } else {
        format!("{reference}:latest")
    };
    let is_it = |name: &String| *name == tagged || name.ends_with(&format!("/{tagged}"));
    names.iter().any(is_it).then(|| {
        let digest = names.iter().find(|name| name.contains("@sha256:"));
        // What was brought to a node by hand may have no digest.
        digest.cloned().unwrap_or(tagged)
    })
}

async fn client(settings: &Settings) -> Result<Client, RuntimeError> {
    let unusable = |error: &dyn std::fmt::Display| {
        let from = settings
            .kubeconfig
            .as_ref()
            .map_or("the service account of this pod".to_owned(), |path| path.display().to_string());
        RuntimeError::Host(format!("kubernetes.kubeconfig: {from} cannot be used: {error}"))
    };
    let mut config = match &settings.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).map_err(|error| unusable(&error))?;
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(|error| unusable(&error))?
        }
        None => kube::Config::incluster().map_err(|error| unusable(&error))?,
    };
    config.connect_timeout = Some(QUESTION);
    Client::try_from(config).map_err(|error| unusable(&error))
}

/// Waits for an answer of the API server, and puts a failure into our words.
async fn answered<T>(question: impl Future<Output = kube::Result<T>>) -> Result<T, ApiError> {
    match tokio::time::timeout(QUESTION, question).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) => {
            Err(ApiError::Refused { code: status.code, message: status.message.clone() })
        }
        Ok(Err(error)) => Err(ApiError::Unavailable(error.to_string())),
        Err(_) => Err(ApiError::Unavailable(format!("no answer in {} s", QUESTION.as_secs()))),
    }
}

/// What the API server says when it does not do what it is asked.
#[derive(Debug, Clone, thiserror::Error)]
enum ApiError {
    #[error("{message}")]
    Refused { code: u16, message: String },
    #[error("{0}")]
    Unavailable(String),
}

impl ApiError {
    fn is_conflict(&self) -> bool {
        matches!(self, Self::Refused { code: 409, .. })
    }

    fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: 404, .. })
    }

    /// Whether asking again would get the same answer: what is asked for is wrong, or not allowed.
    fn is_final(&self) -> bool {
        matches!(self, Self::Refused { code: 400 | 403 | 404 | 413 | 422, .. })
    }
}

impl From<ApiError> for RuntimeError {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::Refused { code: code @ (401 | 403), message } => Self::Host(format!(
                "the cluster refuses (code {code}): {message}; config/kubernetes shows the rights that a gateway needs"
            )),
            error => Self::Unavailable(format!("the cluster: {error}")),
        }
    }
}

#[async_trait]
impl Runtime for Kubernetes {
    async fn start(
        &self,
        spec: &WorkloadSpec,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<(), RuntimeError> {
        let patience = Patience::begin();
        loop {
            let started = Box::pin(self.start_workload(spec, progress)).await;
            if !patience.again(&started).await {
                return started;
            }
        }
    }

    async fn remove(&self, name: &str, grace: Duration) -> Result<(), RuntimeError> {
        let _turn = self.turns.take(name).await;
        self.remove_workload(name, grace).await
    }

    async fn terminate(&self, name: &str) -> Result<(), RuntimeError> {
        self.terminate_workload(name).await
    }

    async fn list(&self) -> Result<Vec<Found>, RuntimeError> {
        let pods = self.all().await?;
        Ok(pods.iter().filter_map(|pod| standing::found(pod, &self.config.instance)).collect())
    }

    async fn inspect(&self, name: &str) -> Result<Option<Found>, RuntimeError> {
        let pod = self.pod(name).await?;
        Ok(pod.and_then(|pod| standing::found(&pod, &self.config.instance)))
    }

    async fn result(&self, name: &str) -> Result<Option<JobResult>, RuntimeError> {
        Ok(self.pod(name).await?.and_then(|pod| standing::result(&pod)))
    }

    fn events(&self) -> BoxStream<'static, RuntimeEvent> {
        let instance = self.config.instance.clone();
        let settings = watcher::Config::default().labels(&self.selector());
        let events = watcher(self.pods.clone(), settings).default_backoff().filter_map(move |event| {
            let news = match event {
                Ok(watcher::Event::Apply(pod) | watcher::Event::Delete(pod)) => {
                    standing::workload(&pod, &instance).map(RuntimeEvent::Changed)
                }
                Ok(watcher::Event::InitDone) => Some(RuntimeEvent::Resync),
                Ok(watcher::Event::Init | watcher::Event::InitApply(_)) => None,
                Err(error) => {
                    tracing::warn!(%error, "the watch on the cluster's pods broke; it is made anew");
                    None
                }
            };
            std::future::ready(news)
        });
        events.boxed()
    }

    fn passes_descriptors(&self) -> bool {
        false
    }

    async fn connect(&self, name: &str) -> Result<UnixStream, RuntimeError> {
        self.connect_workload(name).await
    }

    async fn resolve_image(
        &self,
        reference: &str,
        _: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<String, RuntimeError> {
        // The node that is to run it fetches it; whether it can, the pod's status says.
        let patience = Patience::begin();
        loop {
            let pinned = self.on_a_node(reference).await;
            if !patience.again(&pinned).await {
                return Ok(pinned?.unwrap_or_else(|| reference.to_owned()));
            }
        }
    }

    async fn image_present(&self, reference: &str) -> Result<Option<String>, RuntimeError> {
        self.on_a_node(reference).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_known_by_the_names_that_nodes_write_out() {
        let names =
            ["registry.invalid/library/tools@sha256:12".to_owned(), "registry.invalid/library/tools:1".to_owned()];
        assert_eq!(pinned(&names, "tools:1").as_deref(), Some("registry.invalid/library/tools@sha256:12"));
        assert_eq!(pinned(&names, "library/tools:1").as_deref(), Some("registry.invalid/library/tools@sha256:12"));
        for other in ["tools:2", "ools:1", "tools"] {
            assert_eq!(pinned(&names, other), None, "{other}");
        }
        let by_hand = ["registry.invalid/library/tools:latest".to_owned()];
        assert_eq!(pinned(&by_hand, "tools").as_deref(), Some("tools:latest"));
    }
}
