//! What was: who held which slice at a time, and what was used.

use super::LeasedSlice;
use jiff::{Timestamp, civil::Date};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Who held which slice at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Past {
    /// The time.
    pub at: Timestamp,
    /// Leases that ended by then are forgotten in part: what is told of that time is not all of it.
    pub incomplete: bool,
    /// Leases of slices that were held then, by user and workload.
    pub leases: Vec<PastLease>,
}

/// A lease that held its slices at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PastLease {
    /// The user the workload belongs to.
    pub user: String,
    /// The workload that held it.
    pub workload: String,
    /// The project it counted for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// The profile: a MIG profile's name, or `gpu`.
    pub profile: String,
    /// Memory of each slice, in MiB.
    pub memory_mib: u64,
    /// Where its slices were, with the UUIDs that they had last.
    pub slices: Vec<LeasedSlice>,
    /// When it was granted.
    pub granted_at: Timestamp,
    /// When its slices were free again; none if they are held still.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// Why it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What leases have used, of slices and of whole GPUs. A slice counts as what of its GPU it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    /// The day, UTC; none for all of them together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = Date)]
    pub day: Option<Date>,
    /// The user; none for all of them together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The project; none for no project, or for all of them together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<String>,
    /// Seconds of slices.
    pub slice_seconds: u64,
    /// Seconds of whole GPUs, each slice by its share of the compute slices.
    pub compute_seconds: u64,
    /// Seconds of whole GPUs, each slice by its share of the memory.
    pub memory_seconds: u64,
    /// Seconds of whole GPUs, each slice by the larger of both shares: what limits of GPU time count.
    pub gpu_seconds: u64,
    /// Leases that ended.
    pub leases: u64,
}

/// What was used from one day to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UsageList {
    /// The first day, UTC.
    #[schema(value_type = String, format = Date)]
    pub from: Date,
    /// The last day.
    #[schema(value_type = String, format = Date)]
    pub to: Date,
    /// The first day of which use is known at all.
    #[schema(value_type = String, format = Date)]
    pub kept_since: Date,
    /// Ordered by day, user, project.
    pub usage: Vec<Usage>,
}
