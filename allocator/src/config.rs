//! Settings of the service: a TOML file, and flags over it.

use crate::nodes::NodeFlags;
use mlad_allocator::{
    AllocatorError, Gpus, QueueSettings, Settings,
    placement::{Objective, PolicyName},
    queue::Backfill,
    remote::NodeSettings,
    service::Listen,
};
use serde::Deserialize;
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

/// Flags of `mlad-allocator serve`; each has a key of the same name in the file.
#[derive(Debug, clap::Args)]
pub(crate) struct Flags {
    /// Settings in TOML; a flag overrides its key.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where to listen: ADDRESS:PORT, or unix:PATH [default: unix:/run/mlad/allocator.sock].
    #[arg(long)]
    listen: Option<String>,
    /// The SQLite database [default: /var/lib/mlad/allocator.db].
    #[arg(long, value_name = "FILE")]
    database: Option<PathBuf>,
    /// The GPUs: `system` for the system's NVML, `none`, or the path of a libnvidia-ml.so [default: system].
    #[arg(long)]
    nvml: Option<String>,
    /// A file with the token that callers must show; needed with TCP.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The name of this machine in leases and maps [default: its host name].
    #[arg(long)]
    node: Option<String>,
    /// Seconds a lease lasts unless it is renewed [default: 60].
    #[arg(long)]
    lease_seconds: Option<u64>,
    /// What decides where a slice is placed: first-fit, best-fit, least-fragmentation, expected-loss or
    /// expected-room [default: expected-room].
    #[arg(long)]
    policy: Option<PolicyName>,
    /// What is to be as many as possible: requests or slices [default: slices].
    #[arg(long)]
    objective: Option<Objective>,
    /// Whether those behind somebody who waits for space are served: none, easy or conservative [default: easy].
    #[arg(long)]
    backfill: Option<Backfill>,
    /// Days after which GPU time that was used counts half in the fair share [default: 7].
    #[arg(long)]
    half_life_days: Option<u32>,
    /// Hours after which who waits is ahead of everybody who has not waited so long [default: 72].
    #[arg(long)]
    patience_hours: Option<u32>,
    /// Seconds of notice for a lease that has to give way [default: 60].
    #[arg(long)]
    notice_seconds: Option<u32>,
    #[command(flatten)]
    nodes: NodeFlags,
}

/// What the file may hold.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConfigFile {
    listen: Option<String>,
    database: Option<PathBuf>,
    nvml: Option<String>,
    token_file: Option<PathBuf>,
    node: Option<String>,
    lease_seconds: Option<u64>,
    policy: Option<PolicyName>,
    objective: Option<Objective>,
    backfill: Option<Backfill>,
    half_life_days: Option<u32>,
    patience_hours: Option<u32>,
    notice_seconds: Option<u32>,
    nodes: NodeFlags,
}

/// The settings in force.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) listen: Listen,
    pub(crate) token_file: Option<PathBuf>,
    database: PathBuf,
    nvml: String,
    node: Option<String>,
    lease_seconds: u64,
    policy: PolicyName,
    objective: Objective,
    queue: QueueSettings,
    nodes: Option<NodeSettings>,
}

impl Config {
    pub(crate) fn read(flags: &Flags) -> Result<Self, AllocatorError> {
        let file = flags.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
        let pick = |flag: &Option<String>, key: Option<String>| flag.clone().or(key);
        let queue = queue(flags, &file);
        let listen = pick(&flags.listen, file.listen).unwrap_or_else(|| "unix:/run/mlad/allocator.sock".to_owned());
        let database = flags.database.clone().or(file.database);
        Ok(Self {
            listen: listen.parse()?,
            token_file: flags.token_file.clone().or(file.token_file),
            database: database.unwrap_or_else(|| "/var/lib/mlad/allocator.db".into()),
            nvml: pick(&flags.nvml, file.nvml).unwrap_or_else(|| "system".to_owned()),
            node: pick(&flags.node, file.node),
            lease_seconds: flags.lease_seconds.or(file.lease_seconds).unwrap_or(Settings::LEASE.as_secs()),
            policy: flags.policy.or(file.policy).unwrap_or_default(),
            objective: flags.objective.or(file.objective).unwrap_or_default(),
            queue,
            nodes: flags.nodes.clone().or(file.nodes).settings()?,
        })
    }

    /// What must not be, however well it reads.
    pub(crate) fn check(&self) -> Result<(), AllocatorError> {
        if matches!(self.listen, Listen::Tcp(_)) && self.token_file.is_none() {
            let why = "listening on TCP needs `token_file`: who reaches the port could take every slice";
            return Err(AllocatorError::Settings(why.to_owned()));
        }
        if self.queue.half_life.is_zero() {
            return Err(AllocatorError::Settings("half_life_days has to be 1 or more".to_owned()));
        }
        if !(5..=86_400).contains(&self.lease_seconds) {
            return Err(AllocatorError::Settings("lease_seconds has to be from 5 to 86400".to_owned()));
        }
        Ok(())
    }

    pub(crate) fn settings(&self) -> Result<Settings, AllocatorError> {
        let gpus = match self.nvml.as_str() {
            "system" => Gpus::System,
            "none" => Gpus::None,
            path => Gpus::Library(path.into()),
        };
        let lease = Duration::from_secs(self.lease_seconds);
        let node = self.node.clone().map_or_else(host_name, Ok)?;
        let (policy, objective, queue, nodes) = (self.policy, self.objective, self.queue, self.nodes.clone());
        Ok(Settings { database: self.database.clone(), node, gpus, lease, policy, objective, queue, nodes })
    }
}

fn queue(flags: &Flags, file: &ConfigFile) -> QueueSettings {
    let usual = QueueSettings::default();
    let time = |flag: Option<u32>, key: Option<u32>, unit: u64, usual: Duration| {
        flag.or(key).map_or(usual, |count| Duration::from_secs(u64::from(count) * unit))
    };
    QueueSettings {
        backfill: flags.backfill.or(file.backfill).unwrap_or_default(),
        half_life: time(flags.half_life_days, file.half_life_days, 86_400, usual.half_life),
        patience: time(flags.patience_hours, file.patience_hours, 3600, usual.patience),
        notice: time(flags.notice_seconds, file.notice_seconds, 1, usual.notice),
    }
}

fn read_file(path: &Path) -> Result<ConfigFile, AllocatorError> {
    let wrong = |why: String| AllocatorError::Settings(format!("{}: {why}", path.display()));
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    toml::from_str(&text).map_err(|error| wrong(error.to_string()))
}

fn host_name() -> Result<String, AllocatorError> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname");
    let name = name.map_err(|error| AllocatorError::Settings(format!("the host name: {error}; set `node`")))?;
    Ok(name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_the_default() {
        let flags = |config: Option<&str>| Flags {
            config: config.map(Into::into),
            listen: None,
            database: None,
            nvml: None,
            token_file: None,
            node: Some("dgx-1".to_owned()),
            lease_seconds: None,
            policy: None,
            objective: None,
            backfill: None,
            half_life_days: None,
            patience_hours: None,
            notice_seconds: None,
            nodes: NodeFlags::default(),
        };
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/allocator.toml");
        let [example, default] = [Some(example), None].map(|file| Config::read(&flags(file)).unwrap());
        assert_eq!(example, default);
        example.check().unwrap();
    }
}
