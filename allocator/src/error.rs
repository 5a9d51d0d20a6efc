//! What can go wrong in the allocator.

use serde::{Deserialize, Serialize};

/// What can go wrong in the allocator; travels over its HTTP service as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "detail")]
pub enum AllocatorError {
    /// No GPU here can ever fit the request. The text names what would fit.
    #[error("{0}")]
    Impossible(String),
    /// The request alone is over its user's limits: it could never be granted.
    #[error("{0}")]
    Quota(String),
    /// The request is malformed.
    #[error("{0}")]
    Invalid(String),
    /// The reservation is not there, is not for who asks, or cannot be made.
    #[error("{0}")]
    Reservation(String),
    /// More requests wait, or leases are held, already than the allocator takes.
    #[error("{0}")]
    TooMany(String),
    /// There is no request of that workload.
    #[error("no lease and no waiting request of workload {0}")]
    Unknown(String),
    /// The lease or request is over.
    #[error("the lease of workload {0} is over")]
    Ended(String),
    /// The fence is not the lease's.
    #[error("the fence of workload {0} is not the one given")]
    Fence(String),
    /// The driver refuses or is absent.
    #[error("the NVIDIA driver: {0}")]
    Driver(String),
    /// The database refuses.
    #[error("the allocator's database: {0}")]
    Store(String),
    /// A setting is wrong.
    #[error("{0}")]
    Settings(String),
    /// The allocator's service cannot be reached.
    #[error("the allocator at {url} cannot be reached: {reason}")]
    Unreachable {
        /// Where it should be.
        url: String,
        /// Why not.
        reason: String,
    },
}
