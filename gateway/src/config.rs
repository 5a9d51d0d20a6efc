//! The settings of the gateway, read from one TOML file. Every key stands, commented, in `config/default.toml`.

mod check;
mod kubernetes;
mod reload;
#[cfg(test)]
mod tests;

pub use kubernetes::{Kubernetes, PodSecurity, Toleration, Volume};

use mlad::api::Need;
use mlad_allocator::{
    placement::{Objective, PolicyName},
    queue::Backfill,
};
use serde::Deserialize;
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is not TOML, or has a key or value that is wrong; the text names key and line.
    #[error("{path}: {message}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Key, line and reason.
        message: String,
    },
    /// A value is out of bounds or contradicts another.
    #[error("{path}{}: {key}: {message}", line.map(|line| format!(":{line}")).unwrap_or_default())]
    Value {
        /// Which file.
        path: PathBuf,
        /// The line the key stands on; none if its default is wrong beside another key.
        line: Option<usize>,
        /// Dotted name of the key.
        key: &'static str,
        /// What is wrong with it and what would be right.
        message: String,
    },
}

/// All settings.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Folder of everything that must survive: databases, host keys, `home/`, `datasets/`, `projects/`.
    pub data_directory: PathBuf,
    /// Folder of what lives as long as the machine runs: sockets, one folder per workload.
    pub run_directory: PathBuf,
    /// Prefix of container names and value of their `mlad.instance` label, so that several gateways can
    /// share an engine: lower-case letters and digits, at most 16.
    #[serde(default = "defaults::instance")]
    pub instance: String,
    /// The static `mlad` binary that is mounted into containers.
    pub agent_binary: PathBuf,
    /// The catalog of images.
    pub catalog: PathBuf,
    /// The SSH server.
    #[serde(default)]
    pub ssh: Ssh,
    /// The HTTP API on TCP.
    #[serde(default)]
    pub api: Api,
    /// Workspaces.
    #[serde(default)]
    pub workspace: WorkspaceSettings,
    /// Jobs.
    #[serde(default)]
    pub job: JobSettings,
    /// What every container gets.
    #[serde(default)]
    pub container: Container,
    /// The container engine.
    #[serde(default)]
    pub docker: Docker,
    /// The cluster, if containers are pods; Docker runs them if absent.
    pub kubernetes: Option<Kubernetes>,
    /// Users' files: sftp and scp.
    #[serde(default)]
    pub files: Files,
    /// The allocator.
    #[serde(default)]
    pub allocator: Allocator,
}

/// The SSH server.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Ssh {
    /// Addresses to listen on.
    pub listen: Vec<SocketAddr>,
    /// The login name that is everybody's.
    pub shared_login: String,
    /// Seconds a client has to authenticate.
    pub login_grace_seconds: u64,
    /// Connections at once, all users and the unauthenticated together.
    pub max_connections: usize,
    /// Unauthenticated connections at once.
    pub max_unauthenticated: usize,
    /// Unauthenticated connections from which on some are dropped by chance, the more the nearer they are to the
    /// most; none are if that is no less.
    pub early_drop_from: usize,
    /// How many of a hundred are dropped where that begins.
    pub early_drop_percent: u32,
    /// Longest time a source is shut out whose connections come to nothing, in seconds; none ever is if it is 0.
    pub max_penalty_seconds: u64,
    /// Networks that are never shut out.
    pub penalty_exempt: Vec<IpNetwork>,
    /// Load balancers, which say with the PROXY protocol from where a connection comes.
    pub proxy_protocol_from: Vec<IpNetwork>,
    /// Connections of one user at once.
    pub max_connections_per_user: usize,
    /// Channels of one connection at once.
    pub max_channels: usize,
    /// Channels and listeners of one user at once, on all connections together.
    pub max_channels_per_user: usize,
    /// Failed tries of one connection.
    pub max_tries: usize,
    /// Enrolment codes one address may try in a minute.
    pub enrolment_tries_per_minute: u32,
    /// Seconds without a sign of life from a client until a keepalive is sent.
    pub keepalive_seconds: u64,
}

impl Default for Ssh {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([0, 0, 0, 0], 2222))],
            shared_login: "mlad".into(),
            login_grace_seconds: 60,
            max_connections: 2000,
            max_unauthenticated: 200,
            early_drop_from: 100,
            early_drop_percent: 30,
            max_penalty_seconds: 600,
            penalty_exempt: vec![IpNetwork::LOOPBACK_V4, IpNetwork::LOOPBACK_V6],
            proxy_protocol_from: Vec::new(),
            max_connections_per_user: 100,
            max_channels: 64,
            max_channels_per_user: 256,
            max_tries: 6,
            enrolment_tries_per_minute: 6,
            keepalive_seconds: 60,
        }
    }
}

/// The HTTP API on TCP.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Api {
    /// Address to listen on; the API is not served on TCP if absent.
    pub listen: Option<SocketAddr>,
}

/// Workspaces.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkspaceSettings {
    /// Image of a login that names none; the picker asks on a terminal if absent.
    pub default_image: Option<String>,
    /// Slice of a login that names none; the picker asks on a terminal if absent.
    pub default_need: Option<Need>,
    /// Minutes after which a workspace is stopped whose slice no process uses, after a warning; never if absent.
    pub unused_gpu_minutes: Option<NonZeroU32>,
    /// Minutes a workspace stays after its last connection.
    pub idle_minutes: u64,
    /// Most minutes from now for which `mlad workspace extend` keeps a workspace that nobody is connected to.
    pub max_extension_minutes: u64,
    /// Seconds a login without a terminal waits for a slice.
    pub wait_without_terminal_seconds: u64,
    /// Workspaces of one user.
    pub max_per_user: u32,
}

impl Default for WorkspaceSettings {
    fn default() -> Self {
        Self {
            default_image: None,
            default_need: None,
            unused_gpu_minutes: None,
            idle_minutes: 30,
            max_extension_minutes: 24 * 60,
            wait_without_terminal_seconds: 600,
            max_per_user: 8,
        }
    }
}

/// Jobs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobSettings {
    /// Time limit of a job that names none, in minutes.
    pub time_limit_minutes: u64,
    /// Longest time limit a job may name, in minutes.
    pub max_time_limit_minutes: u64,
    /// Seconds between SIGTERM and SIGKILL.
    pub grace_seconds: u64,
    /// Attempts of one job, if those before failed for a fault of the machine.
    pub max_attempts: u32,
    /// Seconds after such a fault until the next attempt; twice as long each time.
    pub retry_seconds: u64,
    /// Jobs of one user that have not ended.
    pub max_per_user: u32,
    /// Jobs without a GPU that run at once, all users together: the others wait.
    pub max_without_gpu: u32,
}

impl Default for JobSettings {
    fn default() -> Self {
        Self {
            time_limit_minutes: 24 * 60,
            max_time_limit_minutes: 7 * 24 * 60,
            grace_seconds: 30,
            max_attempts: 3,
            retry_seconds: 10,
            max_per_user: 1000,
            max_without_gpu: 32,
        }
    }
}

/// What every container gets.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Container {
    /// CPUs, in thousandths of a core.
    pub cpu_milli: u64,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Most memory a job may ask for, in MiB.
    pub max_memory_mib: u64,
    /// Processes and threads.
    pub pids: u32,
    /// Size of `/dev/shm` in MiB.
    pub shared_memory_mib: u64,
    /// Whether containers may reach the outside (never each other, the host or metadata services).
    pub internet: bool,
    /// How a container gets its slice.
    pub gpu_binding: GpuBinding,
    /// With `cdi`: program and arguments that make the CDI specifications anew, for a slice that none names.
    pub cdi_command: Vec<String>,
    /// With `cdi`: folders of the CDI specifications, those of the engine.
    pub cdi_directories: Vec<PathBuf>,
}

impl Default for Container {
    fn default() -> Self {
        Self {
            cpu_milli: 4000,
            memory_mib: 16 * 1024,
            max_memory_mib: 64 * 1024,
            pids: 4096,
            shared_memory_mib: 1024,
            internet: true,
            gpu_binding: GpuBinding::DeviceRequest,
            cdi_command: ["nvidia-ctk", "cdi", "generate", "--output=/var/run/cdi/nvidia.yaml"]
                .map(str::to_owned)
                .to_vec(),
            cdi_directories: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
        }
    }
}

/// How a container gets its slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GpuBinding {
    /// By a CDI device name, `nvidia.com/gpu=<uuid>`: engines with an API of 1.44 or later, such as Docker 25,
    /// with CDI on.
    Cdi,
    /// By a device request to the NVIDIA runtime, which asks the driver when the container starts.
    DeviceRequest,
    /// By environment variables alone: simulated GPUs.
    Environment,
}

/// The container engine.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Docker {
    /// Its socket.
    pub socket: PathBuf,
    /// Subnet of the containers' network; the engine chooses if absent.
    pub subnet: Option<IpNetwork>,
    /// Name of the bridge of the containers' network, at most 15 characters; made of the instance's name if
    /// absent.
    pub bridge: Option<String>,
    /// What keeps containers from the host, from each other and from private networks.
    pub firewall: Firewall,
    /// Private networks that containers may reach all the same (a package mirror, a licence server).
    pub allowed_networks: Vec<IpNetwork>,
    /// Further networks that containers may not reach (public addresses of the campus, say).
    pub blocked_networks: Vec<IpNetwork>,
    /// Name servers of the containers; those of the host if empty.
    pub dns: Vec<IpAddr>,
}

/// What keeps containers from the host, from each other and from private networks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Firewall {
    /// Rules in nftables tables of our own, put in place by the `nft` program.
    #[default]
    Nftables,
    /// Nothing: something else sees to it.
    None,
}

/// A network in CIDR notation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct IpNetwork {
    address: IpAddr,
    prefix: u8,
}

impl IpNetwork {
    /// This machine, by IPv4.
    pub const LOOPBACK_V4: Self = Self { address: IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), prefix: 8 };
    /// This machine, by IPv6.
    pub const LOOPBACK_V6: Self = Self { address: IpAddr::V6(Ipv6Addr::LOCALHOST), prefix: 128 };

    /// Whether it is of IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        let (differing, length) = match (self.address, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => (u128::from(network.to_bits() ^ address.to_bits()), 32),
            (IpAddr::V6(network), IpAddr::V6(address)) => (network.to_bits() ^ address.to_bits(), 128),
            _ => return false,
        };
        // Of a prefix of no bits nothing is left to differ.
        differing.checked_shr(length - u32::from(self.prefix)).unwrap_or(0) == 0
    }
}

impl std::fmt::Display for IpNetwork {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}/{}", self.address, self.prefix)
    }
}

impl std::str::FromStr for IpNetwork {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text} is not a network such as 10.1.0.0/16 or fd00:1::/32");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().map_err(|_| wrong())?;
        let (bits, length) = match address {
            IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
            IpAddr::V6(address) => (address.to_bits(), 128),
        };
        if prefix > length {
            return Err(wrong());
        }
        if bits.checked_shl(u32::from(prefix)).unwrap_or(0) != 0 {
            return Err(format!("{text} is not a network: bits beyond its prefix are set"));
        }
        Ok(Self { address, prefix })
    }
}

impl TryFrom<String> for IpNetwork {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl Default for Docker {
    fn default() -> Self {
        Self {
            socket: "/var/run/docker.sock".into(),
            subnet: None,
            bridge: None,
            firewall: Firewall::default(),
            allowed_networks: Vec::new(),
            blocked_networks: Vec::new(),
            dns: Vec::new(),
        }
    }
}

/// Users' files: sftp and scp.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Files {
    /// Whether to refuse to serve files on a kernel without Landlock (Linux before 5.19). The mount
    /// namespace and the uid hold a worker in either way; Landlock is a second wall.
    pub require_landlock: bool,
    /// The program whose `worker` subcommand serves files; the gateway's own if absent.
    pub worker_binary: Option<PathBuf>,
}

impl Default for Files {
    fn default() -> Self {
        Self { require_landlock: true, worker_binary: None }
    }
}

/// The allocator.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Allocator {
    /// Where it runs as a service (`unix:/path` or `http://address:port`); embedded if absent.
    pub url: Option<String>,
    /// File with the bearer token for that service.
    pub token_file: Option<PathBuf>,
    /// The name that this machine has there, if that service has several: containers run here, and so have their
    /// slices to be here.
    pub node: Option<String>,
    /// Name of this machine among the nodes, for the embedded one (with pods: the node's in the cluster); what the
    /// kernel calls it if absent.
    pub node_name: Option<String>,
    /// The NVML library, for the embedded one; the system's if absent.
    pub nvml_library: Option<PathBuf>,
    /// Seconds a lease lasts without renewal.
    pub lease_seconds: Option<u64>,
    /// What decides where the embedded one places a slice.
    pub policy: Option<PolicyName>,
    /// What the embedded one makes as many as possible.
    pub objective: Option<Objective>,
    /// Whether those behind somebody who waits for space are served.
    pub backfill: Option<Backfill>,
    /// Days after which GPU time that was used counts half in the fair share: 1 or more.
    pub half_life_days: Option<NonZeroU32>,
    /// Hours after which who waits is ahead of everybody who has not waited so long.
    pub patience_hours: Option<u32>,
    /// Seconds of notice for a lease that has to give way.
    pub notice_seconds: Option<u32>,
}

impl Config {
    /// Reads and checks a file. Relative paths in it are relative to its folder.
    ///
    /// # Errors
    /// When it cannot be read, is not TOML, has an unknown key, a value is out of bounds, or a program that is
    /// named is not there; the message names file, line and key.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        let config = Self::parse(&text, path)?;
        check::there(&config).map_err(|wrong| wrong.in_file(path, &text))?;
        Ok(config)
    }

    /// What the text of the file `path` says, without a look at what its paths name.
    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = toml::from_str(text)
            .map_err(|error| ConfigError::Parse { path: path.to_path_buf(), message: error.to_string() })?;
        let folder = std::path::absolute(path)
            .map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?
            .parent()
            .map(Path::to_path_buf)
            .unwrap_or_default();
        config.resolve_paths(&folder);
        check::check(&config).map_err(|wrong| wrong.in_file(path, text))?;
        Ok(config)
    }

    /// What is allowed and seldom meant: to be told to the operator.
    pub fn doubts(&self) -> Vec<String> {
        check::doubts(self)
    }

    /// Makes every relative path one below `folder`.
    fn resolve_paths(&mut self, folder: &Path) {
        let optional =
            [&mut self.allocator.nvml_library, &mut self.allocator.token_file, &mut self.files.worker_binary];
        let always = [
            &mut self.data_directory,
            &mut self.run_directory,
            &mut self.agent_binary,
            &mut self.catalog,
            &mut self.docker.socket,
        ];
        let lists = &mut self.container.cdi_directories;
        let cluster = self.kubernetes.iter_mut().flat_map(|cluster| {
            let volumes = cluster.volumes.iter_mut();
            volumes
                .flat_map(|volume| std::iter::once(&mut volume.folder).chain(&mut volume.host_path))
                .chain(&mut cluster.kubeconfig)
        });
        for path in always.into_iter().chain(optional.into_iter().flatten()).chain(lists).chain(cluster) {
            *path = folder.join(&*path);
        }
    }

    /// Where a user's home lies on the host.
    pub fn home_of(&self, user: &str) -> PathBuf {
        self.data_directory.join("home").join(user)
    }

    /// Where the shared datasets lie on the host.
    pub fn datasets(&self) -> PathBuf {
        self.data_directory.join("datasets")
    }

    /// The administration socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.run_directory.join("admin.sock")
    }

    /// The folder shared with the container of one workload (`/run/mlad/agent` in it).
    pub fn workload_directory(&self, workload: &str) -> PathBuf {
        self.run_directory.join("workloads").join(workload)
    }
}

/// Makes the folders that the settings name, if they are absent; whatever the mask of whoever starts the
/// gateway, with the rights they need.
///
/// # Errors
/// When one cannot be made.
pub fn make_folders(config: &Config) -> std::io::Result<()> {
    // Others may pass through to what is theirs, but not look around.
    let passage = [&config.data_directory, &config.run_directory].map(|folder| (folder.clone(), 0o711));
    let workloads = (config.run_directory.join("workloads"), 0o711);
    let shared = ["home", "datasets", "projects"].map(|name| (config.data_directory.join(name), 0o755));
    for (folder, mode) in passage.into_iter().chain([workloads]).chain(shared) {
        if folder.is_dir() {
            continue;
        }
        std::fs::create_dir_all(&folder)?;
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

mod defaults {
    pub(super) fn instance() -> String {
        "mlad".into()
    }
}
