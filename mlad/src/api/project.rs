//! Projects: users who share a quota.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Users who share a quota.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Project {
    /// Its name: a lower-case letter, then lower-case letters, digits, `-` or `_`; at most 32.
    pub name: String,
    /// The project it lies in, whose limits hold for it too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// What its members may hold together, and use up.
    pub limits: ProjectLimits,
    /// What they hold and have used; none while the allocator does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<ProjectUse>,
    /// Its members by name. Those of projects within it are not members of it.
    pub members: Vec<String>,
    /// When it was made.
    pub created_at: Timestamp,
}

impl Project {
    /// In the place of a project's name: no project.
    pub const NONE: &str = "none";
}

/// What the members of a project may hold together, and use up; what is absent is without limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectLimits {
    /// Slices (or whole GPUs) at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slices: Option<u32>,
    /// GPU memory at once, in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory_mib: Option<u64>,
    /// GPU time in 30 days, in seconds of whole GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_seconds: Option<u64>,
}

/// What the members of a project hold together, and have used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProjectUse {
    /// Slices held now.
    pub slices: u32,
    /// GPU memory held now, in MiB.
    pub gpu_memory_mib: u64,
    /// GPU time in the last 30 days, in seconds of whole GPUs.
    pub gpu_seconds: u64,
}

/// Projects by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProjectList {
    /// Those the caller may see.
    pub projects: Vec<Project>,
    /// What the caller's requests count for that name no project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<String>,
}

/// A project to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewProject {
    /// Its name.
    pub name: String,
    /// The project it is to lie in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
}

/// What the caller's requests are to count for that name no project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DefaultProject {
    /// The project; none for no project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
}
