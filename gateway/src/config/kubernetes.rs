//! The settings of a cluster whose pods are the containers.

use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, path::PathBuf};

/// The cluster whose pods are the containers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kubernetes {
    /// How to reach it; as a pod of it if absent.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of the pods.
    #[serde(default = "defaults::namespace")]
    pub namespace: String,
    /// The image that brings the static `mlad`.
    pub agent_image: String,
    /// Port of the agents.
    #[serde(default = "defaults::agent_port")]
    pub agent_port: u16,
    /// What the folders of the data directory are to pods.
    pub volumes: Vec<Volume>,
    /// What the pods may do.
    #[serde(default)]
    pub pod_security: PodSecurity,
    /// Whether pods have user namespaces of their own: what is root in one is nobody on its node. The cluster must know
    /// them (Kubernetes 1.33 and later), or does as if this were not set.
    #[serde(default)]
    pub user_namespaces: bool,
    /// Names of the secrets that fetch images.
    #[serde(default)]
    pub image_pull_secrets: Vec<String>,
    /// Labels that a node must have.
    #[serde(default)]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that the pods put up with.
    #[serde(default)]
    pub tolerations: Vec<Toleration>,
    /// Runtime class of pods with a GPU (`nvidia`, say).
    pub gpu_runtime_class: Option<String>,
    /// Priority class of the pods.
    pub priority_class: Option<String>,
    /// CPUs that a pod is promised, in thousandths of a core; at most `container.cpu_milli`.
    #[serde(default = "defaults::cpu_request_milli")]
    pub cpu_request_milli: u64,
    /// What a pod may write outside its volumes, in MiB.
    #[serde(default = "defaults::ephemeral_storage_mib")]
    pub ephemeral_storage_mib: u64,
    /// Seconds that a pod may wait for a node with room.
    #[serde(default = "defaults::schedule_seconds")]
    pub schedule_seconds: u64,
    /// Seconds from then until its agent answers, the fetching of its image included.
    #[serde(default = "defaults::start_seconds")]
    pub start_seconds: u64,
}

/// A folder of the gateway as pods mount it. Exactly one of `claim` and `host_path` is named.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// The folder, as the gateway sees it.
    pub folder: PathBuf,
    /// The claim, of access mode ReadWriteMany, that the folder is the root of.
    pub claim: Option<String>,
    /// Where the folder is on every node (a network file system that all mount).
    pub host_path: Option<PathBuf>,
}

/// What pods may do, in the words of Kubernetes' pod security standards.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PodSecurity {
    /// Nothing runs as root, the agent neither.
    #[default]
    Restricted,
    /// The agent is root with the few capabilities it has with Docker, too: the user cannot get at it, and the image's
    /// own files can be changed for the user.
    Baseline,
}

/// A taint that pods put up with.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Toleration {
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// `Exists` or `Equal`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operator: Option<String>,
    /// Its value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`; all if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effect: Option<String>,
}

mod defaults {
    pub(super) fn namespace() -> String {
        "mlad".into()
    }

    pub(super) const fn agent_port() -> u16 {
        7222
    }

    pub(super) const fn cpu_request_milli() -> u64 {
        500
    }

    pub(super) const fn ephemeral_storage_mib() -> u64 {
        20 * 1024
    }

    pub(super) const fn schedule_seconds() -> u64 {
        120
    }

    pub(super) const fn start_seconds() -> u64 {
        900
    }
}
