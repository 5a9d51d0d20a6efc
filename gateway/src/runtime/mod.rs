//! What runs containers: the contract, and Docker and Kubernetes behind it.
//!
//! A runtime knows workloads by name and nothing of users' wishes; every verb can be repeated.

mod docker;
mod kubernetes;
mod turns;
mod workload;

pub use docker::Docker;
pub use kubernetes::Kubernetes;

use async_trait::async_trait;
use futures::stream::BoxStream;
use mlad::channel::{AgentConfig, JobResult};
use std::{path::PathBuf, time::Duration};
use tokio::net::UnixStream;

/// A container to run.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkloadSpec {
    /// Its name, `w-<workspace>-<generation>` or `j-<job>-<attempt>`: starting the same name twice starts
    /// one container.
    pub name: String,
    /// Fence of its lease, kept as a label.
    pub fence: u64,
    /// The engine's reference of the image, pinned by digest or image id.
    pub image: String,
    /// Host name in the container, what a prompt shows: the workspace's name or `job-<id>`. Characters that
    /// host names cannot have become `-`.
    pub hostname: String,
    /// What the agent is to be.
    pub agent: AgentConfig,
    /// Host folders in the container.
    pub mounts: Vec<Mount>,
    /// UUIDs of the slices it is to see; no GPU if empty.
    pub gpu_uuids: Vec<String>,
    /// The node those slices are on; any will do if absent. Of no matter to a runtime of one machine.
    pub node: Option<String>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// CPUs in thousandths of a core.
    pub cpu_milli: u64,
}

/// A host folder in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// On the host.
    pub source: PathBuf,
    /// In the container.
    pub target: PathBuf,
    /// Whether the container may not write there.
    pub read_only: bool,
}

/// A container that exists, as the runtime shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Name of the workload, from the label.
    pub name: String,
    /// Fence of its lease, from the label.
    pub fence: u64,
    /// What it does.
    pub state: FoundState,
}

/// What a container does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FoundState {
    /// Made, but not started.
    Created,
    /// Runs.
    Running,
    /// Ended.
    Ended(Ended),
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Exit code of its process 1.
    pub exit_code: i64,
    /// Whether its memory was used up, as far as the runtime knows: it may learn that after the end, or never.
    /// [`JobResult::out_of_memory`] is a job's agent's word on it.
    pub out_of_memory: bool,
    /// Why the runtime ended it, if it did so of its own accord: the machine had to be emptied, say.
    pub taken_away: Option<String>,
}

/// News from the runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeEvent {
    /// Something about this workload changed: look again.
    Changed(String),
    /// The connection to the runtime was made anew: look at everything again.
    Resync,
}

/// Progress of a start, for whoever waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartProgress {
    /// The image is being fetched: bytes so far and in all, where known.
    Pulling(u64, Option<u64>),
    /// The container is being made.
    Creating,
    /// It runs; its agent is being waited for.
    Connecting,
}

/// What can go wrong at a runtime.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RuntimeError {
    /// The host is not ready for containers: somebody must change something first.
    #[error("{0}")]
    Host(String),
    /// The engine does not answer: try again later.
    #[error("the container engine does not answer: {0}")]
    Unavailable(String),
    /// The image is not there and cannot be had.
    #[error("the image {image} cannot be had: {reason}")]
    Image {
        /// Which.
        image: String,
        /// Why.
        reason: String,
    },
    /// The container cannot be started.
    #[error("the container {name} cannot be started: {reason}")]
    Start {
        /// Which.
        name: String,
        /// Why.
        reason: String,
    },
    /// No such container runs.
    #[error("no container {0} runs")]
    Gone(String),
    /// Its agent does not answer, or not as it should.
    #[error("the agent of {name} does not answer: {reason}")]
    Agent {
        /// Which.
        name: String,
        /// Why.
        reason: String,
    },
}

/// What runs containers.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Makes the container, starts it and returns when its agent listens. Repeatable: a container of that
    /// name that runs is left as it is; one that was made and not started is started. A job is never started
    /// twice: if its container has ended, or ends before it was reached, that is no error, and
    /// [`Runtime::inspect`] and [`Runtime::result`] say how.
    ///
    /// # Errors
    /// After an error nothing of that name is left running, except after [`RuntimeError::Unavailable`] or
    /// when the call was cancelled: then [`Runtime::remove`] makes sure.
    async fn start(
        &self,
        spec: &WorkloadSpec,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<(), RuntimeError>;

    /// Ends the container (SIGTERM, `grace`, SIGKILL) and removes it; returns when it is proven gone.
    /// Repeatable; no such container is no error.
    ///
    /// # Errors
    /// When the engine does not answer: the container may still run.
    async fn remove(&self, name: &str, grace: Duration) -> Result<(), RuntimeError>;

    /// Sends SIGTERM to process 1, which ends its job with its own grace; returns at once.
    ///
    /// # Errors
    /// When the engine does not answer. A container that is not there is no error.
    async fn terminate(&self, name: &str) -> Result<(), RuntimeError>;

    /// Every container with this instance's label, whatever its state.
    ///
    /// # Errors
    /// When the engine does not answer.
    async fn list(&self) -> Result<Vec<Found>, RuntimeError>;

    /// Looks at one container; none if it is not there.
    ///
    /// # Errors
    /// When the engine does not answer.
    async fn inspect(&self, name: &str) -> Result<Option<Found>, RuntimeError>;

    /// What became of a job's command, as its agent wrote it down; none if it did not, or not as it should.
    /// Readable from the end of the container until [`Runtime::remove`]. The container may have forged it: it
    /// concerns that job alone.
    ///
    /// # Errors
    /// When the engine does not answer or the host's disk fails.
    async fn result(&self, name: &str) -> Result<Option<JobResult>, RuntimeError>;

    /// News, without end: reconnects by itself and says `Resync` when it did (and at the beginning).
    fn events(&self) -> BoxStream<'static, RuntimeEvent>;

    /// Whether descriptors reach the agent over [`Runtime::connect`]'s connections: it is on this machine.
    fn passes_descriptors(&self) -> bool {
        true
    }

    /// A new connection to the agent of a running workload.
    ///
    /// # Errors
    /// When it does not run or its agent does not listen.
    async fn connect(&self, name: &str) -> Result<UnixStream, RuntimeError>;

    /// The pinned reference (digest or image id) of an image; fetched if it is absent and can be.
    ///
    /// # Errors
    /// [`RuntimeError::Image`] when it cannot be had.
    async fn resolve_image(
        &self,
        reference: &str,
        progress: &(dyn Fn(StartProgress) + Send + Sync),
    ) -> Result<String, RuntimeError>;

    /// The pinned reference of an image that is present; none if it is not.
    ///
    /// # Errors
    /// When the engine does not answer.
    async fn image_present(&self, reference: &str) -> Result<Option<String>, RuntimeError>;
}

/// Who wants to know which workloads run: the API, to take the calls that come out of them.
pub trait WorkloadObserver: Send + Sync + 'static {
    /// The agent of this workload, which belongs to `user`, can be reached. Repeatable.
    fn running(&self, workload: &str, user: &str);

    /// It cannot any more. Repeatable.
    fn gone(&self, workload: &str);
}

/// Names become parts of paths and of addresses.
fn check_name(name: &str) -> Result<(), RuntimeError> {
    let good = name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.len() <= 64
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if good {
        return Ok(());
    }
    Err(RuntimeError::Start {
        name: name.chars().filter(|letter| !letter.is_control()).take(64).collect(),
        reason: "a workload's name has lower-case letters, digits and hyphens only, at most 64".to_owned(),
    })
}
