//! The daemon of a machine with GPUs.

use super::{
    desk::Desk,
    identity::{Credentials, is_node_name},
    lease_clock::LeaseClock,
    session::{End, session},
    wire::{Hello, VERSION, is_identifier},
};
use crate::{
    AllocatorError, Gpus,
    node::{Driver, Node, NvmlDriver},
};
use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    process::Stdio,
    sync::Arc,
    time::Duration,
};
use tokio::{process::Command, sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;

/// How a daemon runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSettings {
    /// The name of this machine.
    pub node: String,
    /// Where the allocator hears nodes: host and port.
    pub allocator: String,
    /// The name in the allocator's certificate, if it is not the host's.
    pub server_name: Option<String>,
    /// Who this machine is, and whose certificates count.
    pub credentials: Credentials,
    /// Where the GPUs come from.
    pub gpus: Gpus,
    /// A folder for what has to be known after a restart of the daemon, and not after one of the machine.
    pub state: PathBuf,
    /// A program that ends every workload of MLAD on this machine, beside what the daemon does itself.
    pub stop_command: Option<PathBuf>,
}

/// The first pause after a connection that came to nothing, and the longest.
const PAUSE: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(5)];
/// How long the program that ends workloads may take.
const STOP_COMMAND: Duration = Duration::from_secs(20);
/// How long after ending what runs came to nothing it is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// Reports of GPUs that may wait.
const REPORTS: usize = 256;
/// How long the GPUs' threads may take to end.
const THREADS: Duration = Duration::from_secs(3);

/// What changes with every start of this machine.
///
/// # Errors
/// [`AllocatorError::Settings`] when the kernel does not tell.
pub(crate) fn boot() -> Result<String, AllocatorError> {
    let file = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(file).map_err(|error| AllocatorError::Settings(format!("{file}: {error}")))?;
    Ok(text.trim().to_owned())
}

/// What tells this machine from others; none where it has no such number: then every start makes it another.
fn machine() -> Option<String> {
    let texts = ["/etc/machine-id", "/sys/class/dmi/id/product_uuid"].map(fs::read_to_string);
    texts.into_iter().flatten().map(|text| text.trim().to_owned()).find(|text| is_identifier(text))
}

/// The daemon of a machine with GPUs.
pub struct Daemon {
    settings: DaemonSettings,
    desk: Desk,
    clock: LeaseClock,
    machine: String,
    boot: String,
    /// There is no second daemon while it is held.
    _lock: File,
}

impl Daemon {
    /// Takes over this machine's GPUs.
    ///
    /// # Errors
    /// [`AllocatorError::Settings`] when a setting is wrong, or another daemon runs.
    pub fn start(settings: DaemonSettings) -> Result<Self, AllocatorError> {
        let wrong =
            |path: &Path, why: &dyn std::fmt::Display| AllocatorError::Settings(format!("{}: {why}", path.display()));
        if !is_node_name(&settings.node) {
            let what = "lower-case letters, digits, `-` and `.`, as a host's";
            return Err(AllocatorError::Settings(format!("`{}` cannot name a node: {what}", settings.node)));
        }
        settings.credentials.client()?;
        fs::create_dir_all(&settings.state).map_err(|error| wrong(&settings.state, &error))?;
        let file = settings.state.join("lock");
        let lock = File::options().create(true).append(true).open(&file).map_err(|error| wrong(&file, &error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(wrong(&file, &"another daemon runs; stop it first")),
            Err(TryLockError::Error(error)) => return Err(wrong(&file, &error)),
        }
        let boot = boot()?;
        let machine = machine().unwrap_or_else(|| boot.clone());
        let clock = LeaseClock::open(&settings.state, &boot).map_err(|error| wrong(&settings.state, &error))?;
        let (report, reports) = mpsc::channel(REPORTS);
        let library = match &settings.gpus {
            Gpus::System => None,
            Gpus::Library(path) => Some(path.clone()),
            Gpus::None => return Err(AllocatorError::Settings("a node without GPUs needs no daemon".to_owned())),
        };
        let open = move || Ok(Arc::new(NvmlDriver::open(library.as_deref())?) as Arc<dyn Driver>);
        let node = Node::start(Box::new(open), report).map_err(|error| AllocatorError::Driver(error.to_string()))?;
        let desk = Desk::new(node, reports);
        Ok(Self { settings, desk, clock, machine, boot, _lock: lock })
    }

    /// Serves until `stop`. What runs on the GPUs is not touched by that: who starts the daemon again soon enough
    /// keeps it.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.serve() => {}
        }
        let Self { desk, .. } = self;
        drop(tokio::task::spawn_blocking(|| desk.stop(THREADS)).await);
    }

    async fn serve(&self) {
        let [first, longest] = PAUSE;
        let mut pause = first;
        let mut told = String::new();
        loop {
            let end = tokio::select! {
                () = self.clock.runs_out() => None,
                end = self.connect() => Some(end),
            };
            match end {
                None => {
                    self.stop_workloads("the node's lease ran out: the allocator could not be reached").await;
                    pause = first;
                    continue;
                }
                Some(End::StopFirst(reason)) => {
                    self.clock.run_out();
                    self.stop_workloads(&reason).await;
                    continue;
                }
                Some(End::Refused(reason)) => tracing::error!(reason, "the allocator refuses this node"),
                // Not every few seconds the same.
                Some(End::Failed(reason)) if reason != told => {
                    tracing::warn!(allocator = self.settings.allocator, reason, "not connected; trying on");
                    told = reason;
                    pause = first;
                }
                Some(End::Failed(_)) => {}
            }
            tokio::select! {
                () = self.clock.runs_out() => {}
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(longest);
        }
    }

    async fn connect(&self) -> End {
        // What an earlier connection ordered is finished first: what is read afterwards stays so.
        self.desk.settled().await;
        let hello = Hello {
            version: VERSION,
            node: self.settings.node.clone(),
            machine: self.machine.clone(),
            boot: self.boot.clone(),
            stopped: !self.clock.is_held(),
        };
        session(&self.settings, hello, &self.desk, &self.clock).await
    }

    /// Ends what runs on this machine's GPUs, until it is so.
    async fn stop_workloads(&self, reason: &str) {
        tracing::error!(reason, "ending what this machine's GPUs are used for");
        let mut told = Vec::new();
        loop {
            let mut left: Vec<String> = self.run_stop_command().await.err().into_iter().collect();
            left.extend(self.desk.clear().await);
            if left.is_empty() {
                match self.clock.clear() {
                    Ok(()) => return tracing::info!("nothing runs on this machine's GPUs"),
                    Err(error) => left.push(error.to_string()),
                }
            }
            if left != told {
                tracing::error!(?left, "not everything that uses this machine's GPUs could be ended; trying on");
                told = left;
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn run_stop_command(&self) -> Result<(), String> {
        let Some(program) = &self.settings.stop_command else { return Ok(()) };
        let wrong = |why: &dyn std::fmt::Display| format!("{}: {why}", program.display());
        let mut command = Command::new(program);
        command.env("MLAD_NODE", &self.settings.node).stdin(Stdio::null()).kill_on_drop(true);
        match timeout(STOP_COMMAND, command.status()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(wrong(&status)),
            Ok(Err(error)) => Err(wrong(&error)),
            Err(_) => Err(wrong(&format!("it was not done after {} s", STOP_COMMAND.as_secs()))),
        }
    }
}
