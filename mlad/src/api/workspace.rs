//! Workspaces: a user's interactive containers.

use super::{Lease, Need, Wait};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a workspace is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WorkspaceState {
    /// Known, but no container and no lease.
    Stopped,
    /// Waits for a slice.
    Waiting,
    /// Has a lease; its container is being made.
    Starting,
    /// Its container runs.
    Running,
    /// Its container is being removed; the lease is given back after that.
    Stopping,
}

/// A workspace as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Workspace {
    /// Its name; `default` if the login named none.
    pub name: String,
    /// The user it belongs to.
    pub user: String,
    /// Where it is in its life.
    pub state: WorkspaceState,
    /// Why it is there, in words, where that is not obvious.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Image by catalog name.
    pub image: String,
    /// Slice wanted.
    pub need: Need,
    /// The project it counts for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// The lease it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<Lease>,
    /// What it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<Wait>,
    /// Channels open now.
    pub connections: u32,
    /// When it will be stopped if nobody comes back; none while somebody is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_deadline: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When its container started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
}

/// Workspaces by user and name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WorkspaceList {
    /// Those the caller may see.
    pub workspaces: Vec<Workspace>,
}

/// How long a workspace is to stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WorkspaceExtension {
    /// Minutes from now for which it is kept though nobody is connected.
    pub minutes: u64,
}
