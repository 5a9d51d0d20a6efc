//! The catalog of images.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// An entry of the catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// The name people use.
    pub name: String,
    /// OCI reference, as the runtime knows it.
    pub reference: String,
    /// Digest (or engine image id where there is no registry) that workloads are pinned to; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// One line for people.
    pub description: String,
    /// Least GPU memory it needs, in MiB; 0 for none.
    #[serde(default)]
    pub min_gpu_memory_mib: u64,
    /// Whether the runtime has it, so that it can be started now.
    pub available: bool,
}

/// An image to add to the catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewImage {
    /// The name people use.
    pub name: String,
    /// OCI reference, as the runtime knows it.
    pub reference: String,
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// Least GPU memory it needs, in MiB; 0 for none.
    #[serde(default)]
    pub min_gpu_memory_mib: u64,
}

/// The catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageList {
    /// In the catalog's order.
    pub images: Vec<Image>,
}
