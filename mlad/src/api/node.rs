//! Machines with GPUs.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A machine with GPUs, as the allocator knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Whether slices of it are granted.
    pub state: NodeState,
    /// Since when it is connected, does not answer, or is lost; none for the allocator's own machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// How many GPUs are known to be in it.
    pub gpus: u32,
    /// How many leases hold slices of it.
    pub leases: u32,
    /// Why nothing of it is granted, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// Whether slices of a node are granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NodeState {
    /// Its driver answers.
    Ready,
    /// It is there, and its driver does not answer.
    NoDriver,
    /// Its daemon does not answer: it has some time to come back, and what runs there runs on.
    Away,
    /// Its daemon did not come back in time: what ran there has ended.
    Lost,
}

/// Machines with GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeList {
    /// By name.
    pub nodes: Vec<NodeInfo>,
}
