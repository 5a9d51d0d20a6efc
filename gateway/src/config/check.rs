//! Which values the settings may have: bounds, and what contradicts what. Pure, but for [`there`].

use super::{Config, ConfigError, GpuBinding, Kubernetes, PodSecurity};
use std::{ops::RangeInclusive, path::Path};
use toml::de::{DeTable, DeValue};

/// A value that cannot be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    /// Dotted name of the key.
    pub(super) key: &'static str,
    /// What is wrong with it and what would be right.
    pub(super) message: String,
}

impl Wrong {
    /// As the error of the file `path` with this text.
    pub(super) fn in_file(self, path: &Path, text: &str) -> ConfigError {
        let Self { key, message } = self;
        ConfigError::Value { path: path.to_path_buf(), line: line_of(text, key), key, message }
    }
}

/// Longest path of the run folder: what lies below it must fit into a Unix socket's address (107 bytes).
const MAX_RUN_DIRECTORY: usize = 107 - "/ssh/4294967295/api.sock".len();
/// A day, in seconds.
const DAY: u64 = 24 * 3600;
/// A year, in minutes.
const YEAR_MINUTES: u64 = 366 * 24 * 60;

pub(super) fn check(config: &Config) -> Result<(), Wrong> {
    folders(config)?;
    ssh(config)?;
    workspaces(config)?;
    jobs(config)?;
    containers(config)?;
    if let Some(cluster) = &config.kubernetes {
        kubernetes(config, cluster)?;
    }
    allocator(config)
}

/// Whether what cannot be made by the gateway itself is there.
pub(super) fn there(config: &Config) -> Result<(), Wrong> {
    let agent = &config.agent_binary;
    holds("agent_binary", agent.is_file(), || {
        format!("{} is not there; build the static mlad (scripts/quickstart shows how)", agent.display())
    })
}

fn folders(config: &Config) -> Result<(), Wrong> {
    let run = &config.run_directory;
    holds("run_directory", run.as_os_str().len() <= MAX_RUN_DIRECTORY, || {
        format!("{} is too long: sockets lie in it, so at most {MAX_RUN_DIRECTORY} bytes are allowed", run.display())
    })?;
    let data = &config.data_directory;
    holds("run_directory", run != data && !data.starts_with(run), || {
        "data_directory must not lie in it: it is emptied when the machine starts".into()
    })?;
    let instance = &config.instance;
    let letters = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    holds("instance", (1..=16).contains(&instance.len()) && instance.bytes().all(letters), || {
        format!("{instance:?} must be 1 to 16 lower-case letters and digits")
    })
}

fn ssh(config: &Config) -> Result<(), Wrong> {
    let ssh = &config.ssh;
    holds("ssh.listen", !ssh.listen.is_empty(), || "name at least one address, such as \"0.0.0.0:2222\"".into())?;
    let login = &ssh.shared_login;
    let letters = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_';
    let first = login.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
    holds("ssh.shared_login", first && login.len() <= 32 && login.bytes().all(letters), || {
        format!("{login:?} is no login name: a lower-case letter, then letters, digits, `-` or `_`, at most 32")
    })?;
    within("ssh.login_grace_seconds", ssh.login_grace_seconds, 5..=3600)?;
    within("ssh.max_connections", ssh.max_connections, 1..=100_000)?;
    within("ssh.max_unauthenticated", ssh.max_unauthenticated, 1..=100_000)?;
    within("ssh.early_drop_from", ssh.early_drop_from, 1..=100_000)?;
    within("ssh.early_drop_percent", ssh.early_drop_percent, 1..=100)?;
    within("ssh.max_penalty_seconds", ssh.max_penalty_seconds, 0..=DAY)?;
    within("ssh.max_connections_per_user", ssh.max_connections_per_user, 1..=100_000)?;
    within("ssh.max_channels", ssh.max_channels, 1..=1024)?;
    within("ssh.max_channels_per_user", ssh.max_channels_per_user, 1..=100_000)?;
    within("ssh.max_tries", ssh.max_tries, 1..=100)?;
    within("ssh.enrolment_tries_per_minute", ssh.enrolment_tries_per_minute, 1..=1000)?;
    within("ssh.keepalive_seconds", ssh.keepalive_seconds, 1..=DAY)
}

fn workspaces(config: &Config) -> Result<(), Wrong> {
    let workspace = &config.workspace;
    within("workspace.idle_minutes", workspace.idle_minutes, 0..=YEAR_MINUTES)?;
    within("workspace.max_extension_minutes", workspace.max_extension_minutes, 0..=YEAR_MINUTES)?;
    within("workspace.wait_without_terminal_seconds", workspace.wait_without_terminal_seconds, 0..=7 * DAY)?;
    within("workspace.max_per_user", workspace.max_per_user, 1..=1000)
}

fn jobs(config: &Config) -> Result<(), Wrong> {
    let job = &config.job;
    within("job.max_time_limit_minutes", job.max_time_limit_minutes, 1..=YEAR_MINUTES)?;
    within("job.time_limit_minutes", job.time_limit_minutes, 1..=job.max_time_limit_minutes)?;
    within("job.grace_seconds", job.grace_seconds, 0..=3600)?;
    within("job.max_attempts", job.max_attempts, 1..=100)?;
    within("job.retry_seconds", job.retry_seconds, 0..=DAY)?;
    within("job.max_per_user", job.max_per_user, 1..=1_000_000)?;
    within("job.max_without_gpu", job.max_without_gpu, 1..=100_000)
}

fn containers(config: &Config) -> Result<(), Wrong> {
    let container = &config.container;
    within("container.cpu_milli", container.cpu_milli, 10..=10_000_000)?;
    within("container.max_memory_mib", container.max_memory_mib, 16..=64 * 1024 * 1024)?;
    within("container.memory_mib", container.memory_mib, 16..=container.max_memory_mib)?;
    within("container.pids", container.pids, 16..=4_194_304)?;
    within("container.shared_memory_mib", container.shared_memory_mib, 1..=64 * 1024 * 1024)?;
    let cdi = container.gpu_binding == GpuBinding::Cdi;
    holds("container.cdi_directories", !cdi || !container.cdi_directories.is_empty(), || {
        "name at least one folder of CDI specifications, such as \"/var/run/cdi\"".into()
    })?;
    let bridge = config.docker.bridge.as_deref().unwrap_or("mlad0");
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    holds("docker.bridge", (1..=15).contains(&bridge.len()) && bridge.bytes().all(letters), || {
        format!("{bridge:?} cannot name a network interface: 1 to 15 letters, digits, `-` and `_`")
    })
}

fn kubernetes(config: &Config, cluster: &Kubernetes) -> Result<(), Wrong> {
    holds("kubernetes.agent_image", !cluster.agent_image.trim().is_empty(), || {
        "name the image that brings `mlad` into pods (images/agent)".into()
    })?;
    within("kubernetes.agent_port", cluster.agent_port, 1024..=65535)?;
    within("kubernetes.cpu_request_milli", cluster.cpu_request_milli, 1..=config.container.cpu_milli)?;
    within("kubernetes.ephemeral_storage_mib", cluster.ephemeral_storage_mib, 64..=64 * 1024 * 1024)?;
    within("kubernetes.schedule_seconds", cluster.schedule_seconds, 1..=DAY)?;
    within("kubernetes.start_seconds", cluster.start_seconds, 1..=DAY)?;
    for volume in &cluster.volumes {
        holds("kubernetes.volumes", volume.claim.is_some() != volume.host_path.is_some(), || {
            format!("{}: name either `claim` or `host_path`", volume.folder.display())
        })?;
    }
    for folder in ["home", "datasets"].map(|name| config.data_directory.join(name)) {
        holds("kubernetes.volumes", cluster.volumes.iter().any(|volume| folder.starts_with(&volume.folder)), || {
            format!("none holds {}, which pods mount: add one with folder = {0:?} and a claim", folder.display())
        })?;
    }
    holds("container.gpu_binding", config.container.gpu_binding == GpuBinding::Environment, || {
        "pods get their slices by NVIDIA_VISIBLE_DEVICES: it must be \"environment\"".into()
    })
}

fn allocator(config: &Config) -> Result<(), Wrong> {
    let allocator = &config.allocator;
    if let Some(seconds) = allocator.lease_seconds {
        within("allocator.lease_seconds", seconds, 10..=DAY)?;
    }
    let Some(url) = &allocator.url else {
        holds("allocator.token_file", allocator.token_file.is_none(), || {
            "only an allocator elsewhere takes a token: set allocator.url, or leave this out".into()
        })?;
        return holds("allocator.node", allocator.node.is_none(), || {
            "the allocator in the gateway has this machine only: set allocator.url, or leave this out".into()
        });
    };
    holds("allocator.url", url.starts_with("unix:/") || url.starts_with("http://"), || {
        format!("{url:?} is neither unix:/PATH nor http://ADDRESS:PORT")
    })?;
    holds("allocator.nvml_library", allocator.nvml_library.is_none(), || {
        "the allocator elsewhere has its own: leave this or allocator.url out".into()
    })?;
    for (key, absent) in [
        ("allocator.lease_seconds", allocator.lease_seconds.is_none()),
        ("allocator.policy", allocator.policy.is_none()),
        ("allocator.objective", allocator.objective.is_none()),
        ("allocator.backfill", allocator.backfill.is_none()),
        ("allocator.half_life_days", allocator.half_life_days.is_none()),
        ("allocator.patience_hours", allocator.patience_hours.is_none()),
        ("allocator.notice_seconds", allocator.notice_seconds.is_none()),
    ] {
        holds(key, absent, || "the allocator elsewhere has its own: leave this or allocator.url out".into())?;
    }
    Ok(())
}

fn within<T>(key: &'static str, value: T, bounds: RangeInclusive<T>) -> Result<(), Wrong>
where
    T: PartialOrd + std::fmt::Display,
{
    holds(key, bounds.contains(&value), || format!("it is {value}, and must be {} to {}", bounds.start(), bounds.end()))
}

fn holds(key: &'static str, right: bool, message: impl FnOnce() -> String) -> Result<(), Wrong> {
    if right { Ok(()) } else { Err(Wrong { key, message: message() }) }
}

/// The line, from 1, on which a dotted key stands; none if it does not, and its default is what is wrong.
fn line_of(text: &str, key: &str) -> Option<usize> {
    let document = DeTable::parse(text).ok()?;
    let mut table = document.get_ref();
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        let (name, value) = table.iter().find(|(name, _)| name.get_ref() == part)?;
        if parts.peek().is_none() {
            return Some(text.get(..name.span().start)?.matches('\n').count() + 1);
        }
        let DeValue::Table(inner) = value.get_ref() else { return None };
        table = inner;
    }
    None
}

/// A warning for what is allowed and seldom meant.
pub(super) fn doubts(config: &Config) -> Vec<String> {
    let mut doubts = Vec::new();
    let here = config.kubernetes.is_none() && config.allocator.nvml_library.is_none();
    if config.container.gpu_binding == GpuBinding::Environment && here {
        doubts.push(
            "container.gpu_binding is `environment`, which keeps no container from any GPU: it is for simulated ones"
                .into(),
        );
    }
    let restricted = |cluster: &&Kubernetes| cluster.pod_security == PodSecurity::Restricted;
    if let Some(cluster) = config.kubernetes.as_ref().filter(restricted)
        && cluster.volumes.iter().any(|volume| volume.host_path.is_some())
    {
        doubts.push(
            "kubernetes.volumes: a cluster that holds its namespace to the restricted standard refuses pods with a \
             host_path; use claims"
                .into(),
        );
    }
    doubts
}
