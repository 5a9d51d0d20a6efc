//! What every workload's container has and is told, whatever runs it. Pure.

use super::WorkloadSpec;
use crate::config::GpuBinding;
use mlad::channel::AgentConfig;
use std::collections::BTreeMap;

/// Label: the gateway's instance.
pub(super) const LABEL_INSTANCE: &str = "mlad.instance";
/// Label: the workload's name.
pub(super) const LABEL_WORKLOAD: &str = "mlad.workload";
/// Label: the fence of its lease.
pub(super) const LABEL_FENCE: &str = "mlad.fence";
/// Label, or annotation: whose it is.
pub(super) const LABEL_USER: &str = "mlad.user";

/// Where `mlad` is, inside.
pub(super) const PROGRAM: &str = "/usr/local/bin/mlad";
/// What an agent that is root may do: become the user, end their processes, and make files that are theirs.
pub(super) const CAPABILITIES: [&str; 6] = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID"];
/// Longest host name (RFC 1035).
const MAX_HOSTNAME: usize = 63;

/// What the agent is told: the wish, and which devices its processes see.
pub(super) fn agent_config(spec: &WorkloadSpec, binding: GpuBinding) -> AgentConfig {
    let mut config = spec.agent.clone();
    config.environment.extend(gpu_environment(&spec.gpu_uuids, binding).into_iter().map(|(k, v)| (k.to_owned(), v)));
    config
}

/// Variables that say which slices are to be seen. They are always set: an image of NVIDIA's says `all`.
pub(super) fn gpu_environment(uuids: &[String], binding: GpuBinding) -> BTreeMap<&'static str, String> {
    let list = uuids.join(",");
    let visible = match binding {
        // The device is given by CDI; the older hook must add none.
        _ if uuids.is_empty() => "void".to_owned(),
        GpuBinding::Cdi => "void".to_owned(),
        GpuBinding::DeviceRequest | GpuBinding::Environment => list.clone(),
    };
    BTreeMap::from([("NVIDIA_VISIBLE_DEVICES", visible), ("CUDA_VISIBLE_DEVICES", list)])
}

/// What is left of a name when everything a host name cannot have is a hyphen.
pub(super) fn hostname(wish: &str) -> String {
    let name: String = wish
        .chars()
        .map(|letter| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' })
        .take(MAX_HOSTNAME)
        .collect();
    let name = name.trim_matches('-');
    if name.is_empty() { "workspace".to_owned() } else { name.to_owned() }
}
